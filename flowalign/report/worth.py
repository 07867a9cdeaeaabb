"""The page on what a flow is worth: a verdict, pictures before and after, quality against cost, and every way as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowalign.evaluate.compare import Estimate, match, read_generation
from flowalign.evaluate.worth import Arm, affordable, beats, loses, standing
from flowalign.files import write_text
from flowalign.report.charts import Line, line_chart
from flowalign.report.document import document, figure
from flowalign.report.pictures import sheet

PAIRS = 24
LABELS = {"style": "share of the chosen style", "caption_match": "caption match"}
LOOKS = {"best of n": "loser", "best of n, then flow": "one", "flow, then best of n": "one dashed"}


def verdict(found: Sequence[Arm], about: Mapping[str, Any]) -> str:
    """Sentences: what the flow does for one call, and whether best-of-n does better at as many seconds and at more calls."""
    flow = next(arm for arm in found if arm.way == "flow")
    plain = next(arm for arm in found if arm.way == "best of n" and arm.n == 1)
    share, caption = flow.quality["style"], plain.over_flow["caption_match"]
    change = Estimate(-caption.value, -caption.high, -caption.low)
    kept = "stays within its interval" if change.low <= 0 <= change.high else "rises" if change.low > 0 else "falls"
    first = (
        f"For one call of the generator and {flow.seconds - plain.seconds:.2f} s more, the flow takes the share of the chosen "
        f"style from {plain.quality['style'].value:.2f} to {share.value:.2f}; caption match {kept} "
        f"({plain.quality['caption_match'].value:.3f} to {flow.quality['caption_match'].value:.3f}, difference "
        f"{interval(change, sign='+')}), and {100 * about['identity']['value']:.0f} % of the pictures are still nearest to "
        "themselves."
    )
    return " ".join([first, _at_equal_seconds(found, flow), _at_more_calls(found)])


def _at_equal_seconds(found: Sequence[Arm], flow: Arm) -> str:
    rivals = affordable(found, flow.seconds)
    if all(arm.n == 1 for arm in rivals):
        return (
            f"At equal seconds there is no best-of-n to compare it with: the {flow.seconds:.2f} s of a call and the flow have "
            "no room for a second call."
        )
    told = [f"{arm.name} ({_qualities(arm)}) {outcome(arm)}" for arm in rivals]
    return f"At equal seconds, {flow.seconds:.2f} s a picture, {'; '.join(told)}."


def _at_more_calls(found: Sequence[Arm]) -> str:
    """The smallest n by which every reward's choice wins, or how the largest n fares."""
    plain = [arm for arm in found if arm.way == "best of n" and arm.n > 1]
    if not plain:
        return ""
    winners = {}
    for arm in plain:
        if beats(arm) and arm.chooser not in winners:
            winners[arm.chooser] = arm
    if winners:
        told = [f"{arm.name} ({_qualities(arm)}; {arm.seconds:.2f} s)" for arm in winners.values()]
        return (
            f"Where calls cost nothing, best-of-n wins: {' and '.join(told)}, better than the flow in one and worse in neither."
        )
    most = max(arm.n for arm in plain)
    told = [f"{arm.name} ({_qualities(arm)}; {arm.seconds:.2f} s) {outcome(arm)}" for arm in plain if arm.n == most]
    return f"At more calls best-of-n never wins by both judges: {'; '.join(told)}."


def outcome(arm: Arm) -> str:
    """How an arm fares against the flow alone, in words."""
    if beats(arm):
        return "wins"
    if loses(arm):
        return "loses"
    return "is better in one and worse in the other" if any(standing(arm).values()) else "is as good"


def _qualities(arm: Arm) -> str:
    return f"style {arm.quality['style'].value:.2f}, caption {arm.quality['caption_match'].value:.3f}"


def interval(each: Estimate, digits: int = 3, sign: str = "") -> str:
    # Adding 0 makes a rounded −0 a 0.
    value, low, high = (f"{round(number, digits) + 0.0:{sign}.{digits}f}" for number in (each.value, each.low, each.high))
    return f"{value} [{low}, {high}]".replace("-", "−")


def write_worth(out: Path, found: Mapping[str, Any], compared: Sequence[Arm], *, title: str, how: str) -> Path:
    """Write `report.html` into `out`, where `before/` and `after/` hold the pictures; returns its path.

    found: what `runs.worth.measure_worth` gave. how: one paragraph on how it was measured.
    """
    first, *rest = found["verdict"].split(". ", 1)
    body = [
        f'<header><p class="eyebrow">flowalign · a flow behind an images API, against best-of-n</p><h1>{escape(title)}</h1>'
        f'<p class="verdict">{escape(first.rstrip("."))}.</p>',
        f'<p class="lead">{escape(rest[0])}</p>' if rest else "",
        f"{_facts(found)}</header>",
        _pictures(out, found),
        f'<section><h2>Quality against cost</h2><p class="lead">Up and to the left is better. Seconds are those of a picture '
        f'that is kept, all that were drawn for it included.</p><div class="charts">{_charts(compared)}</div></section>',
        _table(compared),
        f'<section><h2>How this was measured</h2><p class="lead">{escape(how)}</p></section>',
    ]
    path = out / "report.html"
    write_text(path, document(f"{title} · flowalign", "".join(body)))
    return path


def _facts(found: Mapping[str, Any]) -> str:
    seconds, variety = found["seconds"], found["variety"]
    facts = {
        "captions": f"{len(found['prompts'])}, {len(found['seeds'])} seeds each",
        "a call": f"{seconds['draw']:.2f} s",
        "the flow": f"{seconds['flow']:.2f} s, {found['evaluations']} evaluations",
        "choosing": f"{1000 * seconds['choose']:.0f} ms",
        "nearest to itself": f"{found['identity']['value']:.2f}",
        "drift": figure(found["drift"]["value"], 2),
    }
    if variety is not None:
        facts["variety of a prompt"] = f"{variety['before']:.2f} → {variety['after']:.2f}"
    inner = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{inner}</dl>'


def _pictures(out: Path, found: Mapping[str, Any]) -> str:
    draws, first = len(found["seeds"]), found["seeds"][0]
    pairs = [pair for pair in match(read_generation(out / "before"), read_generation(out / "after")) if pair[0].seed == first]
    scores = {
        (prompt, first): {
            judge: {"base": sides[0][place * draws], "aligned": sides[1][place * draws]}
            for judge, sides in found["judged"].items()
        }
        for place, prompt in enumerate(found["prompts"])
    }
    shown, count = sheet(pairs[:PAIRS], scores, ("before", "after"))
    lead = f"The first seed of {count} of {len(pairs)} held-out captions, as the upstream answers and as the proxy does."
    return f'<section><h2>Before and after</h2><p class="lead">{lead}</p>{shown}</section>'


def _charts(compared: Sequence[Arm]) -> str:
    charts = []
    choosers = [name for name in dict.fromkeys(arm.chooser for arm in compared) if name is not None]
    chooser = choosers[-1] if choosers else None
    counts = ", ".join(str(n) for n in sorted({arm.n for arm in compared}))
    for judge in compared[0].quality:
        lines = []
        for way, look in LOOKS.items():
            start = "best of n" if way == "best of n" else "flow"
            points = [
                (arm.seconds, arm.quality[judge].value)
                for arm in compared
                if (arm.way == way and arm.chooser == chooser) or (arm.way == start and arm.n == 1)
            ]
            lines.append(Line(way, look, sorted(points), dots=True))
        note = f"pictures chosen by {chooser}; n = {counts} from the left" if chooser else ""
        charts.append(
            line_chart(LABELS.get(judge, judge), note, lines, across="seconds for a picture that is kept", point="seconds")
        )
    return "".join(charts)


def _table(compared: Sequence[Arm]) -> str:
    judges = list(compared[0].quality)
    heads = "".join(f"<th>{escape(LABELS.get(judge, judge))}</th><th>minus the flow's</th>" for judge in judges)
    lines = []
    for arm in sorted(compared, key=lambda arm: (arm.n > 1, arm.chooser or "", arm.n)):
        cells = []
        for judge in judges:
            each, over = arm.quality[judge], arm.over_flow[judge]
            cells.append(_cell(each, ""))
            cells.append("<td></td>" if arm.way == "flow" and arm.n == 1 else _cell(over, "+"))
        lines.append(
            f'<tr><th scope="row">{escape(arm.name)}</th><td>{arm.calls}</td><td>{arm.seconds:.2f}</td>{"".join(cells)}</tr>'
        )
    return (
        '<section><h2>Every way to get a picture</h2><div class="scroll"><table><thead><tr><th></th><th>calls</th>'
        f"<th>seconds</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _cell(each: Estimate, sign: str) -> str:
    value, _, around = interval(each, sign=sign).partition(" ")
    return f'<td>{value}<span class="interval">{around}</span></td>'
