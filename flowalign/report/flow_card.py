"""`write_flow_card`: what a flow's weights are, for whoever finds the folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flowalign.files import write_text
from flowalign.report.card import contact_sheet
from flowalign.report.pictures import read_samples

MEASURED = {
    "eval/flow/error": "error of the velocity, mean square",
    "eval/flow/power": "mean square of the velocity itself",
    "eval/flow/cosine": "cosine of the two",
}


def write_flow_card(run: Path, config: Mapping[str, Any], metrics: Mapping[str, float], comparisons: int) -> Path:
    """Write `weights/README.md` and, where the run has samples, `weights/samples.png`; returns the card's path.

    config: the run's settings as plain values. metrics: the newest value of each.
    """
    weights, samples = run / "weights", read_samples(run)
    if samples:
        contact_sheet(samples, side=128).save(weights / "samples.png")
    parts = [
        _front(config),
        f"# {run.resolve().name}\n\nA preference flow (Kim et al. 2024, arXiv 2405.19806): it moves pictures of any "
        f"generator from what people reject to what they choose. Trained on {comparisons} comparisons, in {_space(config)}; it "
        f"is told {_context(config)}.",
        "![before and after](samples.png)" if samples else "",
        _usage(run),
        _measured(metrics),
        "## Limits\n\nPictures unlike those trained on are moved less, and the table of what was applied says so. Detail that "
        "the autoencoder cannot hold stays as it was.",
        "## Licence\n\nThe field derives from the pictures it was trained on, and works through the autoencoder and text "
        "encoder named above: their licences apply to them.",
    ]
    path = weights / "README.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _front(config: Mapping[str, Any]) -> str:
    base = (config.get("model") or {}).get("checkpoint", "")
    front: dict[str, Any] = {}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        front = {"base_model": base}
    front |= {"pipeline_tag": "image-to-image", "tags": ["flowalign", "preference-flow-matching"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _space(config: Mapping[str, Any]) -> str:
    if config["space"]["kind"] == "pixels":
        return "pixels"
    source = config["space"].get("autoencoder") or (config.get("model") or {}).get("checkpoint")
    return f"the latents of the autoencoder of `{source}`"


def _context(config: Mapping[str, Any]) -> str:
    checkpoint = (config.get("model") or {}).get("checkpoint")
    told = {"prompt": f"the prompt, as the text encoder of `{checkpoint}` sees it", "class": "which of the known prompts"}
    return told.get(config["context"]["kind"], "nothing of what a picture shows")


def _usage(run: Path) -> str:
    commands = f"flowalign flow apply {run} PICTURES --out DIR\nflowalign generate CHECKPOINT --prompts TEXT --flow {run}"
    python = f'import flowalign\n\nbetter = flowalign.wrap(generator, "{run}")  # generator(prompts, seeds) -> pictures'
    return f"## Use\n\n```\n{commands}\n```\n\n```python\n{python}\n```"


def _measured(metrics: Mapping[str, float]) -> str:
    rows = [f"| {text} | {metrics[name]:.4g} |" for name, text in MEASURED.items() if name in metrics]
    if not rows:
        return ""
    return "## Held-out pairs\n\n" + "\n".join(["| measured | value |", "|---|---|", *rows])
