"""`write_audit_page`: the checks of a set of comparisons as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowalign.evaluate.audit import Audit
from flowalign.evaluate.checks.base import Check
from flowalign.evaluate.survey import Shown
from flowalign.files import write_text
from flowalign.report.charts import shares
from flowalign.report.diagrams import bars
from flowalign.report.document import document, figure, shortened
from flowalign.report.gallery import Thumbnails, picture

WORDS = {"ok": "ok", "look": "look", "bad": "bad"}
SAYS = {
    "ok": "Nothing stands out in these comparisons.",
    "look": "Some things may be meant so or not: see the checks marked look.",
    "bad": "Something here would harm training or make its evaluation worthless: see the checks marked bad.",
}
CAPTIONS = {
    "same_picture": "The same picture on both sides.",
    "duplicates": "Copies and near-duplicates, side by side; pairs of one comparison first.",
    "sizes": "Chosen left, rejected right: pairs of different shape.",
    "picture_leakage": "Left the picture here, right the one in the other split.",
    "agreement": "Chosen left, rejected right: votes furthest from a reward that otherwise agrees.",
}


def write_audit_page(audit: Audit, out: Path) -> Path:
    """Write the page to `out`: the verdict, all checks in a table, and what was found with its pictures."""
    thumbnails = Thumbnails()
    parts = [_header(audit), _overview(audit)]
    parts += [_detail(check, thumbnails) for check in audit.checks]
    parts.append(_counts(audit.counts))
    styles = ("page.css", "scores.css", "audit.css")
    write_text(out, document(f"Audit of {audit.survey.name} · flowalign", "".join(parts), styles=styles, scripts=()))
    return out


def _header(audit: Audit) -> str:
    counts = {word: sum(check.verdict == word for check in audit.checks) for word in ("bad", "look", "ok")}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    drop = len(audit.drop)
    facts = {
        "comparisons": f"{audit.survey.rows:,}",
        "pictures": f"{len(audit.survey.refs):,}",
        "checks": told,
        "rows to leave out": f"{drop:,}",
    }
    shown = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return (
        f'<header><p class="eyebrow">Audit of comparisons</p><h1>{escape(shortened(audit.survey.name, 120))}</h1>'
        f'<p class="verdict">{_badge(audit.verdict)} {SAYS[audit.verdict]}</p><dl class="facts">{shown}</dl></header>'
    )


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict}">{WORDS[verdict]}</span>'


def _overview(audit: Audit) -> str:
    rows = []
    for check in audit.checks:
        drop = f"{len(check.drop):,}" if check.drop else ""
        name = escape(check.title)
        linked = f'<a href="#{check.name}">{name}</a>' if _has_detail(check) else name
        rows.append(
            f'<tr><td>{_badge(check.verdict)}</td><th scope="row">{linked}</th><td class="left">{escape(check.says)}</td>'
            f"<td>{drop}</td></tr>"
        )
    head = (
        '<th scope="col">Verdict</th><th scope="col">Check</th><th scope="col">Found</th><th scope="col">Rows to leave out</th>'
    )
    asked = "".join(f"<li>{escape(name)}: needs {escape(need)}</li>" for name, need in audit.unasked.items())
    more = f'<p class="lead">Not checked:</p><ul class="muted">{asked}</ul>' if asked else ""
    lead = "A row to leave out is a suggestion: suggested_drop.jsonl lists each with its reason."
    return (
        f'<section id="checks"><h2>Checks</h2><p class="lead">{lead}</p><div class="scroll"><table class="checks"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}</section>"
    )


def _has_detail(check: Check) -> bool:
    return bool(check.examples or check.notes or check.numbers.get("rewards"))


def _detail(check: Check, thumbnails: Thumbnails) -> str:
    if not _has_detail(check):
        return ""
    body = _charts(check)
    if check.examples:
        cards = "".join(_together(found, thumbnails) for found in check.examples)
        caption = CAPTIONS.get(check.name, "Examples.")
        body += f'<p class="lead">{caption}</p><ul class="gallery together">{cards}</ul>'
    if check.notes:
        body += "<ul>" + "".join(f"<li>{escape(shortened(note, 300))}</li>" for note in check.notes) + "</ul>"
    return (
        f'<section id="{check.name}"><h2>{escape(check.title)} {_badge(check.verdict)}</h2>'
        f'<p class="lead">{escape(check.says)}</p>{body}</section>'
    )


def _charts(check: Check) -> str:
    rewards: Mapping[str, Mapping[str, Any]] = check.numbers.get("rewards", {})
    known = {name: each for name, each in rewards.items() if each.get("pairs")}
    if not known:
        return ""
    if check.name == "agreement":
        rows = [(name, {key: each[key] for key in ("value", "low", "high")}) for name, each in known.items()]
        drawn = shares(
            rows,
            left_says="contradicts the votes",
            right_says="agrees with the votes",
            axis="votes that a reward agrees with, 95 % interval over prompts",
        )
        return f'<div class="scroll">{drawn}</div>'
    drawn = "".join(
        bars(
            name,
            f"chosen − rejected, in standard deviations; {100 * each['small']:.1f} % nearer than 0.1",
            each["counts"],
            each["edges"],
            each["median"],
            at=0.0,
            unit="pairs",
        )
        for name, each in known.items()
    )
    return f'<div class="charts">{drawn}</div>'


def _together(found: Sequence[Shown], thumbnails: Thumbnails) -> str:
    """Pictures of one example side by side, with the prompts under which they occur."""
    cells = []
    for image, prompt, (width, height) in found:
        words = shortened(prompt, 120)
        shown = picture(thumbnails.of(image) if thumbnails.left > 0 else None, f"picture for: {words}")
        cells.append(
            f'<div>{shown}<span class="prompt">{escape(words)}</span>'
            f'<span class="made">{escape(shortened(image.name, 60))}<br>{width} × {height}</span></div>'
        )
    return f'<li class="scored"><div class="two">{"".join(cells)}</div></li>'


def _counts(counts: Mapping[str, Any]) -> str:
    rows = []
    for name, value in counts.items():
        said = ", ".join(f"{key}: {each:,}" for key, each in value.items()) if isinstance(value, dict) else _number(value)
        rows.append(f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape(said)}</td></tr>')
    lead = "Counted without opening a picture, by the pictures' names in the source."
    return (
        f'<section id="counts"><h2>Counts</h2><p class="lead">{lead}</p><div class="groups"><table><tbody>{"".join(rows)}'
        "</tbody></table></div></section>"
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else figure(value)
