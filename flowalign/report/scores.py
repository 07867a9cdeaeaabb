"""`write_scores_page`: what a score table holds, as one self-contained HTML page, pictures first."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.errors import DataError
from flowalign.evaluate.agreement import agreement
from flowalign.files import write_text
from flowalign.report.diagrams import histogram, matrix, reliability
from flowalign.report.document import document, figure, shortened
from flowalign.report.gallery import Order, Thumbnails, apart, gallery, orders, worth_showing
from flowalign.scoring.table import WHY, ScoreTable

LIMIT = 240
APART = 12  # pictures on which rewards differ most
FAILURES = 100  # rows listed one by one
MEASURES = {"accuracy": "accuracy", "log_loss": "log loss", "brier": "Brier score", "ece": "ECE"}


def write_scores_page(
    table: ScoreTable, out: Path, *, calibration: Mapping[str, Any] | None = None, limit: int = LIMIT
) -> Path:
    """Write the page to `out`: gallery, disagreements, distributions, agreement of rewards, reliability, failures.

    At most `limit` pictures are inlined, as thumbnails: all of a small table, else the best and worst by every reward and an
    even sample of the others. A picture that is not where the table says is shown as missing.

    calibration: what `flowalign calibrate` wrote, parsed: {"rewards": {name: {"before": M, "after": M}}, "fused": M,
        "pairs": n}, where M is {} or {"accuracy" | "log_loss" | "brier" | "ece": [value, low, high] or a number,
        "reliability": [{"predicted", "observed", "count"[, "low", "high"]}]}. Any of it may be missing.

    Raises DataError for a table without rows or rewards, or a limit below 1.
    """
    if not len(table) or not table.rewards:
        raise DataError(f"the table has {len(table)} rows and {len(table.rewards)} rewards; score at least one picture first.")
    if limit < 1:
        raise DataError(f"limit is {limit}; show at least 1 picture.")
    by, thumbnails = orders(table), Thumbnails()
    parts = [
        _gallery(table, by, limit, thumbnails),
        _apart(table, thumbnails),
        _distributions(table, by),
        _agreement(table),
        _reliability(calibration or {}),
        _rewards(table),
        _failures(table),
    ]
    body = _header(table, [part for part in parts if part]) + "".join(parts)
    page = document("Scores · flowalign", body, styles=("page.css", "scores.css"), scripts=("scores.js",))
    write_text(out, page)
    return out


def _section(name: str, title: str, lead: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{body}</section>'


def _unscored(table: ScoreTable) -> int:
    missing = np.zeros(len(table), dtype=bool)
    for name in table.rewards:
        missing |= np.isnan(table.raw(name))
    return int(missing.sum())


def _header(table: ScoreTable, parts: Sequence[str]) -> str:
    missing, prompts = _unscored(table), len(set(table.texts("prompt")))
    lack = f"{missing:,} {'lacks' if missing == 1 else 'lack'} a score" if missing else "none lacks a score"
    names = ", ".join(table.rewards)
    said = (
        f"{len(table):,} {_plural('picture', len(table))} of {prompts:,} {_plural('prompt', prompts)}, scored by "
        f"{len(table.rewards)} {_plural('reward', len(table.rewards))} ({names}); {lack}."
    )
    found = [match for part in parts if (match := re.match(r'<section id="(\w+)"><h2>([^<]*)</h2>', part))]
    links = "".join(f'<a href="#{each[1]}">{each[2]}</a>' for each in found)
    title = '<p class="eyebrow">Scores</p><h1>Scored pictures</h1>'
    return f'<header>{title}<p class="verdict">{escape(said)}</p><nav aria-label="Parts of this page">{links}</nav></header>'


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _gallery(table: ScoreTable, by: Sequence[Order], limit: int, thumbnails: Thumbnails) -> str:
    rows = worth_showing(by, len(table), limit)
    body, count = gallery(table, by, rows, thumbnails)
    which = (
        f"Shown are {count:,} of {len(table):,} pictures: the best and the worst by every reward, and an even sample of the "
        "rest."
        if count < len(table)
        else f"Shown are all {count:,} pictures."
    )
    meaning = {
        "standardised": "the mean of the rewards, each counted in its own standard deviations from its own mean",
        "combined": "the combined score",
    }.get(by[0].kind, by[0].title)
    lead = f"{which} As written, they are sorted by {meaning}, best first."
    options = "".join(
        f'<option value="{place}" data-better="{order.better}">{escape(shortened(order.title, 60))}</option>'
        for place, order in enumerate(by)
    )
    start = "down" if by[0].better == "higher" else "up"
    ways = "".join(
        f'<option value="{way}"{" selected" if way == start else ""}>{text}</option>'
        for way, text in (("down", "highest first"), ("up", "lowest first"))
    )
    controls = (
        f'<div class="controls"><label>Sort by<select id="key">{options}</select></label>'
        f'<label>Order<select id="way">{ways}</select></label>'
        '<label>Prompt contains<input id="find" type="search" autocomplete="off"></label>'
        '<output id="said" for="key way find"></output></div>'
    )
    more = '<p class="controls more"><button id="more" type="button" hidden>Show more</button></p>'
    return _section("pictures", "Pictures", lead, controls + body + more)


def _apart(table: ScoreTable, thumbnails: Thumbnails) -> str:
    if len(table.rewards) < 2:
        return ""
    body, count = apart(table, thumbnails, APART)
    if not count:
        return ""
    if "disagreement" in table.data.column_names:
        how = "by the table's disagreement, the spread of a picture's calibrated scores"
    else:
        how = "by the distance between their highest and lowest score"
    lead = f"The {count} pictures on which the rewards differ most, {how}. Left on the rail is bad, right is good."
    return _section("disagreements", "Worst disagreements", lead, body)


def _distributions(table: ScoreTable, by: Sequence[Order]) -> str:
    drawn = []
    places = {name: place for place, name in enumerate(table.rewards)}
    for order in sorted(by, key=lambda order: (places.get(order.reward, len(places)), order.kind != "raw")):
        failed = int(np.isnan(order.values).sum())
        note = f"{len(table) - failed:,} scored, {failed:,} failed" if order.kind == "raw" else f"{failed:,} without one"
        if order.kind == "raw":
            note += f"; {order.better} is better"
        drawn.append(histogram(order.title, note, order.values))
    return _section(
        "distributions", "Distributions", "How many pictures got which score.", f'<div class="charts">{"".join(drawn)}</div>'
    )


def _agreement(table: ScoreTable) -> str:
    if len(table.rewards) < 2:
        return ""
    scores = np.stack([table.oriented(name) for name in table.rewards], axis=1)
    prompts = [str(prompt) for prompt in table.texts("prompt")]
    found = agreement(scores, prompts)
    counts = found.prompts[~np.eye(len(table.rewards), dtype=bool)]
    drawn = matrix("Over all pictures", "pooled", table.rewards, found.pooled)
    if counts.max():
        span = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        drawn += matrix("Within prompts", f"mean over {span} prompts", table.rewards, found.within)
    lead = (
        "Spearman's rank correlation of every two rewards, each turned so that higher is better. Rewards that agree over all "
        "pictures may only agree on which prompts are easy; to choose among pictures of one prompt, what counts is agreement "
        "within prompts."
    )
    if not counts.max():
        lead += " No prompt has two scored pictures, so that there is none within prompts."
    return _section("agreement", "Agreement of rewards", lead, f'<div class="charts">{drawn}</div>')


def _reliability(calibration: Mapping[str, Any]) -> str:
    found = {name: (each.get("before") or {}, each.get("after") or {}) for name, each in calibration.get("rewards", {}).items()}
    if calibration.get("fused"):
        found["fused"] = ({}, calibration["fused"])
    found = {name: both for name, both in found.items() if both[1].get("reliability")}
    if not found:
        return ""
    drawn = []
    for name, (before, after) in found.items():
        ece = _measure(after.get("ece"))
        drawn.append(reliability(name, f"ECE {ece}" if ece else "", after["reliability"], before.get("reliability") or ()))
    head = "".join(f'<th scope="col">{title}</th>' for title in MEASURES.values())
    rows = []
    for name, (before, after) in found.items():
        for when, values in (("before", before), ("after", after)):
            if values:
                cells = "".join(f"<td>{_measure(values.get(key))}</td>" for key in MEASURES)
                rows.append(f'<tr><th scope="row">{escape(name)}, {when}</th>{cells}</tr>')
    pairs = f" of {calibration['pairs']:,} labelled pairs" if calibration.get("pairs") else " of labelled pairs"
    lead = (
        f"Probabilities{pairs}, grouped by what was said, against the share that turned out so. On the diagonal, a probability "
        "means what it says. Bars and brackets: 95 % intervals."
    )
    table = f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return _section("reliability", "Reliability", lead, f'<div class="charts three">{"".join(drawn)}</div>{table}')


def _measure(value: Any) -> str:
    """A number, or [value, low, high], as HTML."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        value = [value["value"], value["low"], value["high"]]
    if isinstance(value, Sequence):
        return f"{_three(value[0])} [{_three(value[1])}, {_three(value[2])}]"
    return _three(float(value))


def _three(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _rewards(table: ScoreTable) -> str:
    head = ("Reward", "Better", "Range", "Mean", "sd", "Min", "Median", "Max", "Scored", "Failed", "Weights", "Licence")
    rows = []
    for name, card in table.cards.items():
        values = table.raw(name)
        known = values[~np.isnan(values)]
        figures = [f(known) if len(known) else math.nan for f in (np.mean, np.std, np.min, np.median, np.max)]
        low, high = (("−∞" if end < 0 else "∞") if math.isinf(end) else figure(end) for end in card.range)
        cells = [card.better, f"{low} to {high}", *(figure(float(value)) for value in figures)]
        cells += [f"{len(known):,}", f"{len(values) - len(known):,}"]
        text = [shortened(card.weights, 120), shortened(card.licence, 80)]
        rows.append(
            f'<tr><th scope="row">{escape(name)}<span>{escape(shortened(card.title, 120))}</span></th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "".join(f'<td class="left">{escape(cell)}</td>' for cell in text)
            + "</tr>"
        )
    body = "".join(f'<th scope="col"{" class=left" if title in head[-2:] else ""}>{title}</th>' for title in head)
    shown = (
        f'<div class="scroll"><table class="about"><thead><tr>{body}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return _section("rewards", "Rewards", "What each reward says of itself, and its raw scores.", shown)


def _failures(table: ScoreTable) -> str:
    """Rows without a score: how often each reason, and the first ones by name."""
    reasons: Counter[tuple[str, str]] = Counter()
    listed: list[tuple[int, str, str]] = []
    for name in table.rewards:
        missing = np.flatnonzero(np.isnan(table.raw(name)))
        why = table.texts(WHY + name) if WHY + name in table.data.column_names else [None] * len(table)
        found = [(row, name, why[row] or "no reason given") for row in map(int, missing)]
        reasons.update((name, said) for _, _, said in found)
        listed = sorted(listed + found[:FAILURES])[:FAILURES]
    if not listed:
        return ""
    paths, prompts = table.texts("path"), table.texts("prompt")
    rows = "".join(
        f"<tr><td>{row + 1:,}</td><td>{escape(shortened(str(paths[row]), 160))}</td>"
        f"<td>{escape(shortened(prompts[row] or '', 120))}</td><td>{escape(name)}</td>"
        f"<td>{escape(shortened(said, 300))}</td></tr>"
        for row, name, said in listed
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Row", "Picture", "Prompt", "Reward", "Reason"))
    total = sum(reasons.values())
    common = "".join(
        f"<li>{count:,} × {escape(name)}: {escape(shortened(said, 300))}</li>" for (name, said), count in reasons.most_common(8)
    )
    which = f"the first {len(listed):,} of {total:,}" if total > len(listed) else f"all {total:,}"
    lead = (
        f"A failure is never a number: these pictures count nowhere. Listed are {which} missing scores; the reasons, most "
        "frequent first:"
    )
    table_of = f'<div class="scroll"><table class="failures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section("failures", "Failed", lead, f"<ul>{common}</ul>{table_of}")
