"""What pfm_mnist.py found, as tables in its page, a plot, a sheet of digits and JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.papers.multi_sample_page import rounded
from benchmarks.papers.style import write_between
from flowalign.files import write_text

Tree = dict[str, Any]
MARK = "pfm mnist"
ORDER = ("rejected", "base", "dpo", "pfm", "pfm x2")
"""The published ordering, lowest first."""


def best_dpo(found: Tree) -> str:
    """The β of highest mean reward."""
    return max((name for name in found["arms"] if name.startswith("dpo")), key=lambda name: found["arms"][name]["mean"])


def told(arm: Tree) -> str:
    return f"{arm['mean']:.3f} [{arm['low']:.3f}, {arm['high']:.3f}]"


def ordering(found: Tree) -> list[tuple[str, str, str]]:
    """(lower, higher, verdict) of each step of the published ordering: holds where the intervals do not meet."""
    names = [best_dpo(found) if name == "dpo" else name for name in ORDER]
    out = []
    for low, high in pairwise(names):
        first, second = found["arms"][low], found["arms"][high]
        said = "holds" if first["high"] < second["low"] else "is reversed" if second["high"] < first["low"] else "is open"
        out.append((low, high, said))
    return out


def tables(found: Tree) -> list[str]:
    arms = found["arms"]
    lines = ["| | mean reward | variety within a digit | pictures | CPU seconds |", "|---|---|---|---|---|"]
    for name, arm in arms.items():
        spent = f"{arm['cpu']:.0f}" if "cpu" in arm else ""
        lines.append(f"| {name} | {told(arm)} | {arm['spread']:.2f} | {arm['count']:,} | {spent} |")
    lines.append(f"| the real digits | {found['reward_of_digits']:.3f} | {found['spread_of_digits']:.2f} | 10,000 | |")
    best = ", ".join(f"{n}: {value:.3f}" for n, value in found["best_of"].items())
    size = found["size"]
    steps = " · ".join(f"{low} < {high} **{said}**" for low, high, said in ordering(found))
    return [
        *lines,
        "",
        f"Best of n by the same reward, n calls of the generator each: {best}.",
        "",
        f"The published ordering, with the best β of DPO: {steps}.",
        "",
        f"Field of {size['width']} channels, {size['steps']:,} steps of 125 pairs, applied with {size['solver_steps']} steps "
        f"of {size['solver']}; LSGAN of {size['generator_steps']:,} steps ({found['generator_cpu']:.0f} s); "
        f"{size['tuning_steps']} steps of every fine-tuning; {found['cpu'] / 60:.0f} minutes of one core since the last stop. "
        f"LeNet-5: {found['origin']}.",
    ]


def plot(found: Tree, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for name, arm in found["arms"].items():
        look = "C1" if name.startswith("pfm") else "C0" if name.startswith("dpo") else "C2" if "gradient" in name else "0.4"
        across = [[arm["mean"] - arm["low"]], [arm["high"] - arm["mean"]]]
        axes.errorbar(arm["mean"], arm["spread"], xerr=across, fmt="o", color=look, capsize=2)
        axes.annotate(name, (arm["mean"], arm["spread"]), (4, 4), textcoords="offset points", fontsize=8)
    axes.plot(found["reward_of_digits"], found["spread_of_digits"], "k*")
    axes.annotate(
        "real digits", (found["reward_of_digits"], found["spread_of_digits"]), (-58, 4), textcoords="offset points", fontsize=8
    )
    axes.set_xlabel("mean reward: probability of the digit asked for, 95 % interval")
    axes.set_ylabel("variety within a digit")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sheet(found: Tree, path: Path) -> None:
    """A row for each arm: the same z, the same noise, two of each digit."""
    arms = {name: arm["pictures"] for name, arm in found["arms"].items() if "pictures" in arm}
    canvas = Image.new("RGB", (110 + 30 * 20, 30 * len(arms)), "white")
    pen = ImageDraw.Draw(canvas)
    for down, (name, pictures) in enumerate(arms.items()):
        pen.text((4, 10 + 30 * down), name, fill="black")
        for across, pixels in enumerate(pictures):
            ink = (127.5 * (np.array(pixels).reshape(28, 28) + 1)).round().astype(np.uint8)
            canvas.paste(Image.fromarray(ink), (110 + 30 * across, 1 + 30 * down))
    canvas.save(path, optimize=True)


def write_page(found: Tree, page: Path) -> None:
    write_between(page, MARK, tables(found))
    plot(found, page.with_suffix(".png"))
    sheet(found, page.with_name(f"{page.stem}-digits.png"))
    arms = {name: {k: v for k, v in arm.items() if k != "pictures"} for name, arm in found["arms"].items()}
    write_text(page.with_suffix(".json"), json.dumps(rounded(found | {"arms": arms}), indent=1) + "\n")
