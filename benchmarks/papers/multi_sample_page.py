"""What multi_sample.py found, as tables in a page, a plot, a sheet of pictures and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.papers import groups, tones
from benchmarks.papers.style import write_between
from flowalign.evaluate.compare import Estimate, compare
from flowalign.files import write_text

NAME = "multi_sample"
Tree = dict[str, Any]
SHEET = (4, 8)
"""Prompts, and pictures of each, that the sheet shows of every model."""


def per_prompt(values: Sequence[Any], draws: int, measure: Any) -> list[float]:
    """`measure` of the pictures of each prompt; `values` has one entry per picture, prompt by prompt."""
    return [float(measure(values[start : start + draws])) for start in range(0, len(values), draws)]


def mean(values: Sequence[float]) -> Estimate:
    """Mean over prompts, with a percentile bootstrap interval over them."""
    return difference([0.0] * len(values), values)


def difference(base: Sequence[float], other: Sequence[float]) -> Estimate:
    """Mean of other − base, paired by prompt, with its interval."""
    return compare(base, other).mean_difference


def told(estimate: Estimate, digits: int = 3, sign: str = "") -> str:
    value, low, high = (f"{each:{sign}.{digits}f}".replace("-", "−") for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def over_seeds(figures: Sequence[Tree], draws: int, key: str, measure: Any) -> list[float]:
    """The measure of each prompt, averaged over the seeds of training."""
    return np.mean([per_prompt(each[key], draws, measure) for each in figures], axis=0).tolist()


def debias_rows(found: Tree) -> dict[str, Tree]:
    """Estimates by arm."""
    arms, draws = found["arms"], found["draws"]
    light, yellow = (tones.TONES.index(name) for name in ("light", "yellow"))
    index = {name: over_seeds(each, draws, "tones", groups.simpson) for name, each in arms.items()}
    caption = {name: over_seeds(each, draws, "caption_match", np.mean) for name, each in arms.items()}
    rows = {}
    for name, each in arms.items():
        shown = [tone for figures in each for tone in figures["tones"]]
        rows[name] = {
            "index": mean(index[name]),
            "over_dpo": difference(index["dpo"], index[name]),
            "by_seed": [float(np.mean(per_prompt(figures["tones"], draws, groups.simpson))) for figures in each],
            "entropy": mean(over_seeds(each, draws, "tones", groups.entropy)),
            "caption": difference(caption["base"], caption[name]),
            "light": shown.count(light) / len(shown),
            "yellow": shown.count(yellow) / len(shown),
            "margin": float(np.mean([figures["learned"]["train/rewards/margins"] for figures in each]))
            if name != "base"
            else 0.0,
        }
    return rows


def debias_table(rows: dict[str, Tree]) -> str:
    lines = [
        "| model | Simpson index | minus dpo's | entropy, nats | share of light | of yellow | caption match minus base's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        over = "" if name in ("base", "dpo") else told(row["over_dpo"], sign="+")
        caption = "" if name == "base" else told(row["caption"], sign="+")
        lines.append(
            f"| {name} | {told(row['index'])} | {over} | {told(row['entropy'], 2)} | {row['light']:.2f} | {row['yellow']:.2f} "
            f"| {caption} |"
        )
    return "\n".join(lines)


def noise_rows(found: Tree) -> dict[tuple[int, bool], dict[float, Tree]]:
    """Style share and held-out accuracy by (k, whole groups flipped) and rate, over the seeds."""
    rows: dict[tuple[int, bool], dict[float, list[Tree]]] = {}
    for run in found["runs"]:
        rows.setdefault((run["k"], run["whole"]), {}).setdefault(run["rate"], []).append(run)
    base = found["base"]["caption_match"]
    return {
        arm: {
            rate: {
                "share": mean(np.mean([np.array(run["style"]) > 0.5 for run in each], axis=0).tolist()),
                "accuracy": float(np.mean([run["learned"]["eval/rewards/accuracies"] for run in each])),
                "caption": difference(base, np.mean([run["caption_match"] for run in each], axis=0).tolist()),
            }
            for rate, each in sorted(rates.items())
        }
        for arm, rates in rows.items()
    }


def arm_name(arm: tuple[int, bool]) -> str:
    k, whole = arm
    return f"k = {k}{', whole groups flipped' if whole else ''}"


def noise_table(rows: dict[tuple[int, bool], dict[float, Tree]]) -> str:
    rates = sorted({rate for each in rows.values() for rate in each})
    lines = []
    for title, tell in (
        ("share of Fluent", lambda cell: told(cell["share"], 2)),
        ("held-out accuracy", lambda cell: f"{cell['accuracy']:.2f}"),
        ("caption match minus base's", lambda cell: told(cell["caption"], sign="+")),
    ):
        lines += [f"| {title}, by flip rate | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
        for arm, cells in rows.items():
            shown = [tell(cells[rate]) if rate in cells else "" for rate in rates]
            lines.append(f"| {arm_name(arm)} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def plot(debias: dict[str, Tree], noise: dict[tuple[int, bool], dict[float, Tree]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for place, (name, row) in enumerate(debias.items()):
        found = row["index"]
        spread = [[found.value - found.low], [found.high - found.value]]
        left.errorbar(
            found.value, -place, xerr=spread, fmt="o", color="0.5" if name == "base" else "C1" if name[0] == "m" else "C0"
        )
    left.set_yticks([-place for place in range(len(debias))], list(debias))
    left.set_xlabel("Simpson index of tones, held-out prompts, 95 % interval")
    for place, (arm, cells) in enumerate(noise.items()):
        shares = [cells[rate]["share"] for rate in cells]
        spread = [[each.value - each.low for each in shares], [each.high - each.value for each in shares]]
        rates = [rate + 0.004 * (place - 1.5) for rate in cells]
        look = "o:" if arm[1] else "o-"
        right.errorbar(rates, [each.value for each in shares], yerr=spread, fmt=look, capsize=2, label=arm_name(arm))
    right.set_xlabel("share of flipped votes")
    right.set_ylabel("share of Fluent drawings")
    right.set_ylim(0, 1)
    if noise:
        right.legend()
    figure.savefig(path, dpi=110)


def sheet(work: Path, names: Sequence[str], prompts: Sequence[str], draws: int, path: Path) -> None:
    """A row per model and prompt: the first pictures of each, same seeds."""
    shown, columns = min(SHEET[0], len(prompts)), min(SHEET[1], draws)
    places = [number * len(prompts) // shown for number in range(shown)]
    canvas = Image.new("RGB", (110 + 66 * columns * shown, 22 + 66 * len(names)), "white")
    pen = ImageDraw.Draw(canvas)
    for across, place in enumerate(places):
        pen.text((112 + 66 * columns * across, 5), prompts[place], fill="black")
    for down, (name, folder) in enumerate((name, work / "base" if name == "base" else work / "tones" / name) for name in names):
        pen.text((4, 46 + 66 * down), name, fill="black")
        for across, place in enumerate(places):
            for seed in range(columns):
                picture = Image.open(folder / "held_out" / f"{place * draws + seed:05d}-{seed}.png")
                canvas.paste(picture, (110 + 66 * (columns * across + seed), 22 + 66 * down))
    canvas.save(path, optimize=True)


def rounded(value: Any) -> Any:
    """Floats to four digits, wherever they are."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def write_page(found: Tree, folder: Path, work: Path) -> None:
    """Tables into `folder`/multi_sample.md, between its comments, and the plot, the sheet and the raw figures beside it."""
    page = folder / f"{NAME}.md"
    if not page.is_file():
        write_text(page, "".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in ("de-biasing", "label noise")))
    debias, noise = {}, {}
    if "debias" in found:
        debias = debias_rows(found["debias"])
        write_between(page, "de-biasing", debias_table(debias).split("\n"))
        arms, seed = found["debias"]["arms"], found["seeds"][0]
        names = [name if name == "base" else f"{name}-{seed}" for name in arms]
        sheet(work, names, arms["base"][0]["prompts"], found["debias"]["draws"], folder / f"{NAME}-pictures.png")
    if "noise" in found:
        noise = noise_rows(found["noise"])
        write_between(page, "label noise", noise_table(noise).split("\n"))
    plot(debias, noise, folder / f"{NAME}.png")
    write_text(folder / f"{NAME}.json", json.dumps(rounded(found), separators=(",", ":")) + "\n")
