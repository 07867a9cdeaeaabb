"""What emoji_flow.py found, as tables in its page, a plot, a sheet of pictures and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from benchmarks.papers.multi_sample_page import rounded
from benchmarks.papers.style import write_between
from flowalign.evaluate.compare import Estimate
from flowalign.evaluate.worth import Arm, arms
from flowalign.files import write_text
from flowalign.report.worth import interval, outcome
from flowalign.runs.worth import scored

Tree = dict[str, Any]
BAR = {"style": 0.85, "identity": 0.9}
"""What was asked for, together with a caption match that does not change beyond its interval."""
COLUMNS = 12


def within(change: Tree) -> bool:
    return change["low"] <= 0 <= change["high"]


def reaches(figures: Tree) -> bool:
    """Whether a way does all that was asked for."""
    return figures["style"]["value"] >= BAR["style"] and figures["identity"] >= BAR["identity"] and within(figures["change"])


def line(figures: Tree) -> str:
    change = interval(Estimate(**figures["change"]), sign="+")
    return f"style {figures['style']['value']:.2f}, caption {change}, identity {figures['identity']:.2f}"


def worth_table(found: Tree) -> list[str]:
    compared = arms(scored(found))
    lines = [
        "| | calls | seconds | in the style | minus the flow's | caption match | minus the flow's | against the flow |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(compared, key=lambda arm: (arm.n > 1, arm.chooser or "", arm.n)):
        alone = arm.way == "flow" and arm.n == 1
        lines.append(
            f"| {arm.name} | {arm.calls} | {arm.seconds:.2f} | {_cells(arm, alone)} | {'' if alone else outcome(arm)} |"
        )
    seconds, variety = found["seconds"], found["variety"]
    return [
        *lines,
        "",
        f"{len(found['prompts'])} captions, {len(found['seeds'])} seeds each. A call takes {seconds['draw']:.2f} s, the flow "
        f"{seconds['flow']:.2f} s ({found['evaluations']} evaluations of the field), choosing {1000 * seconds['choose']:.0f} "
        f"ms; fitting took {found['seconds_fit']:.0f} s. Nearest to itself: {interval(Estimate(**found['identity']))}; "
        f"distance to itself {interval(Estimate(**found['drift']))}. Distance between a caption's pictures: "
        f"{variety['before']:.3f} before, {interval(Estimate(**variety['difference']), sign='+')} after.",
    ]


def _cells(arm: Arm, alone: bool) -> str:
    cells = []
    for judge in ("style", "caption_match"):
        digits = 2 if judge == "style" else 3
        cells.append(interval(arm.quality[judge], digits))
        cells.append("" if alone else interval(arm.over_flow[judge], digits, "+"))
    return " | ".join(cells)


def ways_table(found: Tree) -> list[str]:
    base = found["before"]
    lines = [
        "| fitted | applied | in the style | caption match | its change | nearest to itself | evaluations | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| | not at all | {base['style']:.2f} | {base['caption_match']:.3f} | | | 0 | |",
    ]
    for fit, ways in found["ways"].items():
        for name, each in ways.items():
            mark = "**" if reaches(each) else ""
            lines.append(
                f"| {fit} | {mark}{name or 'as configured'}{mark} | {interval(Estimate(**each['style']), 2)} | "
                f"{each['caption_match']:.3f} | {interval(Estimate(**each['change']), sign='+')} | {each['identity']:.2f} | "
                f"{each['evaluations']} | {each['cpu']:.2f} |"
            )
    return lines


def plot(found: Tree, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    compared = arms(scored(found["worth"]))
    for panel, (judge, label) in zip(axes, (("style", "share in the style"), ("caption_match", "caption match")), strict=False):
        for way, look in (("best of n", "C1o-"), ("best of n, then flow", "C0o-"), ("flow, then best of n", "C0s--")):
            start = "best of n" if way == "best of n" else "flow"
            shown = sorted(
                (arm for arm in compared if (arm.way == way and arm.chooser == "both") or (arm.way == start and arm.n == 1)),
                key=lambda arm: arm.seconds,
            )
            values = [arm.quality[judge] for arm in shown]
            spread = [[each.value - each.low for each in values], [each.high - each.value for each in values]]
            panel.errorbar(
                [arm.seconds for arm in shown], [each.value for each in values], spread, fmt=look, capsize=2, label=way
            )
        panel.set_xlabel("seconds for a picture that is kept")
        panel.set_ylabel(label)
    axes[0].legend(title="chosen by both rewards")
    base = found["before"]
    axes[2].plot(base["style"], base["caption_match"], "k*", label="before")
    for fit, ways in found["ways"].items():
        points = [(each["style"]["value"], each["caption_match"]) for each in ways.values()]
        axes[2].plot(*zip(*points, strict=True), "o", label=fit)
    axes[2].set_xlabel("share in the style")
    axes[2].set_ylabel("caption match, first two seeds")
    axes[2].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sheet(work: Path, found: Tree, path: Path) -> None:
    """Before and after, of the first seed."""
    prompts, draws, seed = found["prompts"], len(found["seeds"]), found["seeds"][0]
    places: Sequence[int] = [number * len(prompts) // COLUMNS for number in range(min(COLUMNS, len(prompts)))]
    canvas = Image.new("RGB", (66 * len(places), 132), "white")
    for across, place in enumerate(places):
        for down, side in enumerate(("before", "after")):
            picture = Image.open(work / "behind-http" / side / f"{place * draws:05d}-{seed}.png").convert("RGB")
            canvas.paste(picture.resize((64, 64)), (66 * across, 66 * down))
    canvas.save(path, optimize=True)


def write_page(found: Tree, work: Path, page: Path) -> None:
    write_between(page, "worth", [f"> {found['worth']['verdict']}", "", *worth_table(found["worth"])])
    write_between(page, "ways", ways_table(found))
    plot(found, page.with_suffix(".png"))
    sheet(work, found["worth"], page.with_name(f"{page.stem}-pictures.png"))
    raw = ("judged", "rewards")  # every picture's scores: a file of its own would be larger than all others together
    slim = {name: value for name, value in found["worth"].items() if name not in raw}
    write_text(page.with_suffix(".json"), json.dumps(rounded(found | {"worth": slim}), indent=1) + "\n")
