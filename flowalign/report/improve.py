"""`write_improve_page`: an improvement loop as one self-contained HTML page, from `improve.json` and the held-out pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowalign.data.weights import are_even
from flowalign.evaluate.compare import read_generation
from flowalign.files import write_text
from flowalign.report.charts import Line, line_chart
from flowalign.report.document import document, figure, shortened
from flowalign.report.fronts import words
from flowalign.report.improve_fronts import across, interval, reaches
from flowalign.report.pictures import Column, side_by_side
from flowalign.scoring.steered import STEERED

ROWS = 12
"""Prompts shown."""
ACROSS = "round"
Tree = Mapping[str, Any]


def write_improve_page(run: Path) -> Path:
    """Write `report.html` of a loop's folder."""
    about = json.loads((run / "improve.json").read_text(encoding="utf-8"))
    parts = [_header(run, about), _pictures(run, about), across(run, about, ROWS), reaches(about)]
    parts += [_charts(about), _events(about), _table(about)]
    page = run / "report.html"
    write_text(page, document(f"{run.name} · flowalign", "".join(parts), scripts=()))
    return page


def verdict(about: Tree) -> str:
    """What came of it, in two or three sentences."""
    rounds = about["rounds"]
    if not rounds:
        return f"No round was finished. {about['stopped'] or ''}".strip()
    shown = next((each for each in rounds if each["round"] == about["best"]), rounds[-1])
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name, each in shown["measures"].items():
        sides[each["trained"]].append(f"{name} {_rate(each['calibrated'])}")
    asked = {name: weight for name, weight in about["weights"].items() if weight}
    rose = [name for name, weight in asked.items() if _moved(shown["measures"][name]["calibrated"], weight)]
    moved = "None of the rewards" if not rose else "All rewards" if len(rose) == len(asked) else f"{_listed(rose)}"
    kept = f"Round {shown['round']} is kept." if about["best"] is not None else "No round is kept."
    even = _even(about)
    says = f"{moved} moved as asked, beyond chance, on held-out prompts{even}. {kept} "
    says += f"Win rates over the base{even}: {_listed(sides[True])}"
    says += f"; by judges that nothing was trained on, {_listed(sides[False])}." if sides[False] else "."
    if shown.get("reach") is not None:
        now, before = (each["reach"]["hypervolume"] for each in (shown, about["base"]))
        says += f" Hypervolume {words(now)}, of the base {figure(before['value'])}."
    return says + (f" The loop was stopped. {about['stopped']}" if about["stopped"] else "")


def _even(about: Tree) -> str:
    """What is to be said of pictures of a steered policy."""
    return " under even weights" if about["selection"] == STEERED else ""


def _moved(found: Tree, weight: float) -> bool:
    """Whether a win rate is beyond ½ with its interval, on the side that its weight asks for."""
    return bool(found["low"] > 0.5 if weight > 0 else found["high"] < 0.5)


def _rate(found: Tree) -> str:
    return f"{100 * found['value']:.0f} % [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts)


def _header(run: Path, about: Tree) -> str:
    facts = {
        "rounds": f"{len(about['rounds'])} of {about['planned']}",
        "kept": "none" if about["best"] is None else f"round {about['best']}, by {about['best_by']}",
        "base": about["checkpoint"],
        "learns": "a flow each round, behind those before it" if about.get("fit") == "flow" else "the weights",
        "pairs by": "the weights of their pictures" if about["selection"] == STEERED else about["selection"],
        "loss": about["objective"],
        "drawn": "ahead, by a policy one round older" if about["drawing"] == "ahead" else "by the newest policy",
    }
    shown = "".join(f"<div><dt>{key}</dt><dd>{escape(shortened(str(value), 80))}</dd></div>" for key, value in facts.items())
    return (
        f'<header><p class="eyebrow">Improvement loop</p><h1>{escape(run.name)}</h1>'
        f'<p class="verdict">{escape(verdict(about))}</p><dl class="facts">{shown}</dl></header>'
    )


def _charts(about: Tree) -> str:
    """Win rates over the base by round: what was trained on, then the judges, then diversity."""
    if not about["rounds"]:
        return ""
    base, sections, even = about["base"], list[str](), _even(about)
    kinds = (
        (True, f"Rewards trained on{even}", "What the loop selects by rises first here; that alone says little."),
        (
            False,
            "Judges that nothing was trained on",
            "They see the same held-out pictures. Where one falls, a reward is gamed.",
        ),
    )
    for trained, title, lead in kinds:
        names = [name for name, each in base["measures"].items() if each["trained"] is trained]
        drawn = "".join(
            _trajectory(
                name,
                [each["measures"][name]["calibrated"] for each in (base, *about["rounds"])],
                "winner" if trained else "loser",
            )
            for name in names
        )
        if drawn:
            sections.append(f'<section><h2>{title}</h2><p class="lead">{lead}</p><div class="charts">{drawn}</div></section>')
    found = [each["diversity"] for each in (base, *about["rounds"])]
    chart = _line("Diversity", "distance between a prompt’s pictures, 0 to 2", found, "plain", span=None, at=found[0]["value"])
    lead = "The dashed line is the base. A fall says that pictures of one prompt become alike."
    sections.append(f'<section><h2>Diversity</h2><p class="lead">{lead}</p><div class="charts">{chart}</div></section>')
    return "".join(sections)


def _trajectory(name: str, found: Sequence[Tree], look: str) -> str:
    return _line(
        name, "win rate over the base’s pictures of the same prompt, 95 % intervals", found, look, span=(0.0, 1.0), at=0.5
    )


def _line(name: str, note: str, found: Sequence[Tree], look: str, *, span: tuple[float, float] | None, at: float | None) -> str:
    points = [(float(place), each["value"]) for place, each in enumerate(found)]
    whiskers = [(float(place), each["low"], each["high"]) for place, each in enumerate(found) if place]
    line = Line(shortened(name, 40), look, points, dots=True, whiskers=whiskers)
    return line_chart(shortened(name, 60), note, [line], span=span, at=at, across=ACROSS, point="round")


def _pictures(run: Path, about: Tree) -> str:
    """Rows prompts, columns rounds; each cell of a row has the row's seed. Of a steered policy those under even weights."""
    folders = [("base", run / "rounds" / "base")]
    folders += [(f"round {each['round']}", run / "rounds" / f"{each['round'] - 1:02d}") for each in about["rounds"]]
    columns = []
    for place, (name, folder) in enumerate(folders):
        pictures = [each for each in read_generation(folder / "evaluation" / "pictures") if are_even(dict(each.weights))]
        heads = (name, "kept") if place == about["best"] else (name,)
        columns.append(Column(heads, {(each.prompt, each.seed): each for each in pictures}))
    table, shown, of = side_by_side(columns, ROWS)
    lead = f"{shown} of {of} held-out prompts; a row has one prompt and one seed{_even(about)}."
    return f'<section><h2>The same seeds, round by round</h2><p class="lead">{lead}</p>{table}</section>'


def _events(about: Tree) -> str:
    """What the guard between rounds saw."""
    lines = []
    for each in about["rounds"]:
        for sign in each["signs"]:
            mark = "<strong>alarm</strong>: " if sign["alarm"] else ""
            lines.append(f"<li>Round {each['round']}: {mark}{escape(sign['says'])}</li>")
    body = f"<ul>{''.join(lines)}</ul>" if lines else "<p>It was off.</p>"
    loud = sum(sign["alarm"] for each in about["rounds"] for sign in each["signs"])
    lead = f"{loud} alarm{'' if loud == 1 else 's'}. Each compares a round with those before it on held-out prompts."
    return f'<section><h2>Guard between rounds</h2><p class="lead">{lead}</p>{body}</section>'


def _table(about: Tree) -> str:
    names = list(about["base"]["measures"])
    head = "".join(f'<th scope="col">{escape(shortened(name, 30))}</th>' for name in names)
    rows = []
    for each in about["rounds"]:
        cells = "".join(f"<td>{interval(each['measures'][name]['win_rate'])}</td>" for name in names)
        stale = each["staleness"]
        rows.append(f'<tr><th scope="row">{each["round"]}</th><td>{each["comparisons"]}</td><td>{stale}</td>{cells}</tr>')
    lead = (
        "Share of held-out pictures that are better than the base’s of the same seed. Staleness: rounds that the policy which "
        "drew the pictures was older than the one that learned from them."
    )
    return (
        f'<section><h2>Seed against seed</h2><p class="lead">{lead}</p><div class="scroll"><table><thead><tr>'
        f'<th scope="col">Round</th><th scope="col">Comparisons</th><th scope="col">Staleness</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )
