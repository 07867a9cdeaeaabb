"""What a loop's page says of several rewards at once: how far the rounds reach, their fronts, one prompt across the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowalign.evaluate.compare import read_generation
from flowalign.report.document import figure, shortened
from flowalign.report.fronts import Course, Front, course_chart, front_charts
from flowalign.report.pictures import Column, side_by_side

AT_ONCE = 4
"""Rounds whose fronts are told apart in one chart, beside the base."""
Tree = Mapping[str, Any]
NOTE = "means of win rates over the base’s pictures of the same prompt, 95 % intervals"


def reaches(about: Tree) -> str:
    """Sections on hypervolume and fronts; nothing where fewer than two rewards are asked for."""
    base, rounds = about["base"].get("reach"), [each for each in about["rounds"] if each.get("reach")]
    if base is None or not rounds:
        return ""
    steered = bool(rounds[-1]["reach"]["under"])
    names = base["objectives"]
    covered = "pictures under all weights cover together" if steered else "one point of a round covers, its mean by each reward"
    lead = f"The volume that the {covered}, from the base’s worst score by {_listed(names)} upwards. Round 0 is the base."
    courses = [(0.0, base["hypervolume"]), *((float(each["round"]), each["reach"]["hypervolume"]) for each in rounds)]
    charts = course_chart("Hypervolume", NOTE, [Course("policy", courses)], at=base["hypervolume"]["value"])
    shown = f'<p class="lead">{escape(lead)}</p><div class="charts">{charts}</div>'
    more = _fronts(base, rounds, steered) + (_steerability(rounds, names) if steered else "")
    return f"<section><h2>Several rewards at once</h2>{shown}</section>{more}"


def _fronts(base: Tree, rounds: Sequence[Tree], steered: bool) -> str:
    names = base["objectives"]
    if steered:
        count = min(AT_ONCE, len(rounds))
        shown = [rounds[round(place * (len(rounds) - 1) / max(1, count - 1))] for place in range(count)]
        series = [Front(f"round {each['round']}", each["reach"]["points"], _labels(each["reach"]["under"])) for each in shown]
        left = "" if len(shown) == len(rounds) else f" {len(shown)} of {len(rounds)} rounds are shown."
        lead = f"A point is one weight of the objectives, a line the front of a round; up and to the right is better.{left}"
    else:
        points = [each["reach"]["points"][0] for each in rounds]
        series = [Front("rounds", points, [f"round {each['round']}" for each in rounds])]
        lead = "A point is a round; the line runs along those that no other round beats by both."
    (start,) = base["points"]
    charts = front_charts("Fronts", NOTE, series, names, base=start)
    return f'<section><h2>Fronts</h2><p class="lead">{lead}</p>{charts}</section>'


def _steerability(rounds: Sequence[Tree], names: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(shortened(name, 30))}</th>' for name in names)
    rows = []
    for each in rounds:
        found = [each["reach"]["steerability"][name] for name in names]
        cells = "".join("<td>—</td>" if one is None else f"<td>{interval(one)}</td>" for one in found)
        rows.append(f'<tr><th scope="row">{each["round"]}</th>{cells}</tr>')
    lead = (
        "Spearman’s ρ between the weight of a reward and its mean. 1 is the order that was asked for, −1 that order turned "
        "around; with few weights it takes few values."
    )
    return (
        f'<section><h2>Steerability</h2><p class="lead">{lead}</p><div class="scroll"><table><thead><tr>'
        f'<th scope="col">Round</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def across(run: Path, about: Tree, most: int) -> str:
    """The kept round's pictures: a row is a prompt and a seed, a column a weight, from corner to corner."""
    place = next((place for place, each in enumerate(about["rounds"]) if each["round"] == about["best"]), None)
    if place is None or not (about["rounds"][place].get("reach") or {}).get("under"):
        return ""
    pictures = read_generation(run / "rounds" / f"{about['best'] - 1:02d}" / "evaluation" / "pictures")
    columns = []
    for weights in dict.fromkeys(each.weights for each in pictures):
        heads = tuple(f"{shortened(name, 20)} {value:.2g}" for name, value in weights)
        columns.append(Column(heads, {(each.prompt, each.seed): each for each in pictures if each.weights == weights}))
    table, shown, of = side_by_side(columns, most)
    lead = f"{shown} of {of} held-out prompts, drawn by round {about['best']}; a row has one prompt and one seed."
    return f'<section><h2>The same seeds across the weights</h2><p class="lead">{lead}</p>{table}</section>'


def _labels(under: Sequence[Mapping[str, float]]) -> list[str]:
    return [", ".join(f"{name} {value:.2g}" for name, value in each.items()) for each in under]


def interval(found: Mapping[str, float]) -> str:
    """An estimate in a cell of a table, its interval below it."""
    return f'{figure(found["value"])}<span class="interval">[{figure(found["low"])}, {figure(found["high"])}]</span>'


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
