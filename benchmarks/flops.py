"""FLOP of one preference pair on public models, from their settings alone: the table of docs/plan.md.

    python benchmarks/flops.py [--write docs/plan.md]

The settings are in benchmarks/models, one folder a checkpoint, as diffusers stores them. Needs no weights, no GPU and about
a minute on one core.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from flowalign.config import parse
from flowalign.files import write_text
from flowalign.plan.flops import Flops, count
from flowalign.plan.model import outline

MODELS = {
    "sd15": "SD 1.5, 512 px",
    "sdxl": "SDXL, 1024 px",
    "sd3-medium": "SD 3 medium, 1024 px",
    "flux-dev": "FLUX.1 dev, 1024 px",
}
KINDS = {"lora": "LoRA, rank 8", "full": "all weights"}
FOLDER = Path(__file__).parent / "models"
BEGIN, END = "<!-- python benchmarks/flops.py --write docs/plan.md -->", "<!-- end of the table -->"
HEAD = (
    "| model | trained | policy forward | backward | reference | pictures | prompt | re-encoded | cached | bank |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def measure(model: str, kind: str) -> Flops:
    """Count one of `MODELS` trained as one of `KINDS`."""
    tree = {
        "model": {"checkpoint": str(FOLDER / model)},
        "data": {"train": "none"},
        "trainable": {"kind": kind, "rank": 8},
    }
    return count(outline(parse(tree)))


def row(model: str, kind: str, flops: Flops) -> str:
    """A line of the table, in TFLOP."""
    parts = ("policy_forward", "policy_backward", "reference", "images", "prompts", "re_encoded", "cached", "bank")
    numbers = (f"{getattr(flops, part) / 1e12:.2f}" for part in parts)
    return "| " + " | ".join([MODELS[model], KINDS[kind], *numbers]) + " |"


def table(text: str) -> list[str]:
    """The lines that a page holds between the marks."""
    return re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", text, re.DOTALL)[1].splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    options = parser.parse_args()
    lines = [*HEAD, *(row(model, kind, measure(model, kind)) for model in MODELS for kind in KINDS)]
    print("\n".join(lines))
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        write_text(options.write, text.replace("\n".join(table(text)), "\n".join(lines)))


if __name__ == "__main__":
    main()
