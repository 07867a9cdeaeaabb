"""`flowalign demo`: the main job on the embedded world, from preference pairs to a verdict."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flowalign import config as configuration
from flowalign import runs
from flowalign.errors import ConfigError
from flowalign.files import check_folder, write_text

CONFIG = Path("configs/emoji-dpo-lora.yaml")
PICTURES = Path("samples/emoji/emoji.parquet")
CAPTIONS = 120
"""Held-out captions drawn, by base and aligned model alike: what fits into the demo's minutes."""
MARK = "demo.json"
"""What the folder of a demo holds, and no other: what has it may be deleted by the next."""
STEPS = 20
GUIDANCE = 3.0


def demo(out: Path = Path("runs/demo")) -> dict[str, Any]:
    """Align tiny-sd on the train pairs, draw the held-out prompts with it and with the base, judge both, write the report.

    `out` gets the run folder and `metrics.json`; an earlier demo there is replaced. Raises ConfigError outside a clone of
    the project, and where `out` holds something else.
    """
    started = time.perf_counter()
    begin(out, CONFIG)
    config = configuration.load(CONFIG, [f"output={out}"])
    pairs = config.train.steps * config.train.batch_size
    print(
        f"1/3  align: {config.model.checkpoint} on {pairs} draws of pairs that prefer Fluent drawings to Noto ones", flush=True
    )
    align_started = time.perf_counter()
    aligned = runs.align(config)
    seconds_align = time.perf_counter() - align_started
    if not aligned["finished"]:
        return aligned
    prompts = held_out_captions(CAPTIONS)
    print(f"2/3  draw and judge: {len(prompts)} captions of held-out concepts, base and aligned, same seeds", flush=True)
    found = runs.evaluate(
        config.model.checkpoint, str(out), prompts, out=out, steps=STEPS, guidance=GUIDANCE, batch_size=30, precision="bf16"
    )
    style, caption = found["judges"]["style"], found["judges"]["caption_match"]
    metrics = {
        "style_share_base": style["base"]["share"],
        "style_share_aligned": style["aligned"]["share"],
        "style_win_rate": style["win_rate"]["value"],
        "style_win_rate_ci": [style["win_rate"]["low"], style["win_rate"]["high"]],
        "caption_match_base": caption["base"]["mean"],
        "caption_match_aligned": caption["aligned"]["mean"],
        "caption_match_ci": [caption["mean_difference"]["low"], caption["mean_difference"]["high"]],
        "seconds_align": seconds_align,
        "pairs_per_second": aligned["pairs_per_second"],
        "seconds_total": time.perf_counter() - started,
    }
    metrics["verdict"] = verdict(metrics)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    page = runs.report(out)["report"]
    print("3/3  report", flush=True)
    return metrics | {"report": page, "summary": f"{metrics['verdict']}\n{metrics['seconds_total']:.0f} s in all. Open {page}"}


def begin(out: Path, config: Path) -> None:
    """Clear the place of a demo and mark it as one, by which a later demo knows what it may replace. Raises ConfigError."""
    check_folder(out)
    missing = [str(path) for path in (config, PICTURES) if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} not found; the demo uses the project's samples: run it in the root of a clone."
        )
    if out.exists():
        if not (out / MARK).is_file() and any(out.iterdir()):
            raise ConfigError(
                f"{out} is not marked as a demo's: it holds something, but no {MARK}; delete it if it is an earlier demo, or "
                "give --out a new or empty folder."
            )
        shutil.rmtree(out)
    write_text(out / MARK, json.dumps({"demo": str(config)}) + "\n")


def verdict(metrics: dict[str, Any]) -> str:
    """One sentence: did the style move, and did the pictures go on showing what was asked for."""
    low, high = metrics["caption_match_ci"]
    kept = "is unchanged within its interval" if low <= 0 <= high else "rose" if low > 0 else "fell"
    return (
        f"On held-out prompts the share of Fluent drawings went from {metrics['style_share_base']:.2f} to "
        f"{metrics['style_share_aligned']:.2f}; caption match {kept} ({metrics['caption_match_base']:.3f} to "
        f"{metrics['caption_match_aligned']:.3f}, difference [{low:+.3f}, {high:+.3f}])."
    )


def held_out_captions(count: int | None = None) -> list[str]:
    """Captions of the concepts that no training saw, one each; `count` of them, spread evenly over all groups."""
    rows = pq.read_table(PICTURES, columns=["caption", "split"]).to_pylist()
    captions = list(dict.fromkeys(row["caption"] for row in rows if row["split"] == "held_out"))
    if count is None or count >= len(captions):
        return captions
    return [captions[index * len(captions) // count] for index in range(count)]
