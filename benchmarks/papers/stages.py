"""Steps of reproductions that train several models and draw with them; what is finished is kept on disk."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.papers.style import write_between
from flowalign import config as configuration
from flowalign import runs
from flowalign.demo import STEPS
from flowalign.evaluate.judges import load_judges
from flowalign.files import write_text

Tree = dict[str, Any]
TINY = "samples/emoji/tiny-sd"


def write_rows(path: Path, rows: Sequence[Tree]) -> Path:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(pairs: Path, objective: Tree, *, steps: int, seed: int, cache: Path, train: Tree, **sections: Tree) -> Tree:
    """Settings of a LoRA of tiny-sd trained on `pairs`, 16 a step, at a rate that falls to zero; `sections` add and replace."""
    return {
        "model": {"checkpoint": TINY},
        "data": {"train": str(pairs), "held_out": 0.0, "cache": str(cache)},
        "objective": objective,
        "trainable": {"kind": "lora", "rank": 32},
        "train": {
            "steps": steps,
            "batch_size": 16,
            "schedule": "linear",
            "warmup_steps": 5,
            "caption_dropout": 0.2,
            "seed": seed,
            "save_every": None,
        }
        | train,
        "sample": {"count": 1, "steps": 1},
    } | sections


def align(tree: Tree, out: Path) -> dict[str, float]:
    """Train, or take up again what was stopped; the run's last metrics. A run with other settings is replaced."""
    config = configuration.parse(tree | {"output": str(out)})
    if (out / "config.yaml").is_file() and configuration.load(out / "config.yaml") != config:
        shutil.rmtree(out)
    result = runs.align(config, resume=True, progress=False)
    if not result["finished"]:
        raise SystemExit(result["summary"])
    return result["metrics"]


def draw(
    source: str | None, prompts: Sequence[str], seeds: Sequence[int], out: Path, guidance: float, **told: Any
) -> list[Image.Image]:
    """A picture per prompt and seed, prompt by prompt; `told` as `runs.generate` takes it."""
    how: Tree = {"steps": STEPS, "guidance": guidance, "batch_size": 30, "precision": "bf16", "progress": False}
    runs.generate(source, prompts, seeds=seeds, out=out, **how, **told)
    names = [f"{place:05d}-{seed}.png" for place, seed in enumerate(s for _ in prompts for s in seeds)]
    return [Image.open(out / name).convert("RGB") for name in names]


def kept(path: Path, about: Tree, make: Callable[[], Tree]) -> Tree:
    """What `make` gave when it was last called with these settings, from `path`, or what it gives now."""
    about = json.loads(json.dumps(about))
    if path.is_file() and (found := json.loads(path.read_text()))["about"] == about:
        return found["figures"]
    figures = make()
    write_text(path, json.dumps({"about": about, "figures": figures}, indent=1) + "\n")
    return figures


def options_of(doc: str | None, work: str) -> argparse.ArgumentParser:
    """What reproductions are asked: where finished parts are kept, and whether it is a smoke test."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--work", type=Path, default=Path(work), help="where finished parts are kept")
    made.add_argument("--quick", action="store_true", help="a smoke test of a few steps; its figures mean nothing")
    return made


def publish(page: Path, name: str, lines: Sequence[str], found: Any, *, quick: bool) -> None:
    """Print a reproduction's table, and write it between the marks of its page and the figures beside that."""
    print("\n".join(lines))
    if not quick:
        write_between(page, name, lines)
        write_text(page.with_suffix(".json"), json.dumps(found) + "\n")


@cache
def judges() -> dict[str, Any]:
    return {judge.name: judge for judge in load_judges("samples/emoji/judges")}
