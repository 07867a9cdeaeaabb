"""Scored pictures as cards, inlined as thumbnails; and which of many are worth showing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flowalign.data.columns import Pictures
from flowalign.data.images import decode
from flowalign.data.records import ImageRef
from flowalign.errors import DataError
from flowalign.report.document import figure, shortened
from flowalign.report.pictures import inlined
from flowalign.scoring.table import CALIBRATED, ScoreTable

SIDE, LOSSLESS = 176, 64  # pixels: thumbnails of at most this side; smaller pictures than the second without loss
BUDGET = 4_000_000  # characters of inlined pictures a page

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """Numbers by which pictures can be sorted."""

    reward: str
    kind: Literal["raw", "calibrated", "combined", "standardised"]
    values: Array
    """`[n]`; NaN where there is none."""
    better: Literal["higher", "lower"]

    @property
    def title(self) -> str:
        return self.kind if self.kind in ("combined", "standardised") else f"{self.reward}, {self.kind}"

    def best_first(self) -> NDArray[np.int64]:
        """Rows `[n]` from best to worst, those without a value last."""
        signed = self.values if self.better == "higher" else -self.values
        return np.argsort(np.where(np.isnan(signed), np.inf, -signed), kind="stable")


def standardised(values: Array) -> Array:
    """(x − mean)/sd over the values that there are; 0 where all are equal."""
    known = values[~np.isnan(values)]
    spread = known.std() if len(known) else 0.0
    return (values - known.mean()) / spread if spread > 0 else values * 0.0


def comparable(table: ScoreTable) -> tuple[Array, bool]:
    """Scores `[n, K]` on one scale, higher is better, and whether they are calibrated; else raw ones, standardised."""
    if table.rewards and all(CALIBRATED + name in table.data.column_names for name in table.rewards):
        return table.calibrated(), True
    return np.stack([standardised(table.oriented(name)) for name in table.rewards], axis=1), False


def orders(table: ScoreTable) -> list[Order]:
    """All that a table can be sorted by; the first is the default: combined, calibrated, or raw scores made comparable."""
    out: list[Order] = []
    if "combined" in table.data.column_names:
        out.append(Order("", "combined", table.numbers("combined"), "higher"))
    elif len(table.rewards) > 1 and len(table):
        scores = comparable(table)[0]
        known = ~np.isnan(scores)
        means = np.where(known, scores, 0).sum(1) / np.maximum(known.sum(1), 1)
        out.append(Order("", "standardised", np.where(known.any(1), means, np.nan), "higher"))
    for name in table.rewards:
        if CALIBRATED + name in table.data.column_names:
            out.append(Order(name, "calibrated", table.numbers(CALIBRATED + name), "higher"))
    out += [Order(name, "raw", table.raw(name), table.cards[name].better) for name in table.rewards]
    return out


def worth_showing(by: Sequence[Order], count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` of `count` rows: turn by turn the next best and next worst by every order, then an even sample.

    At least a third of the places belongs to the even sample. The result is in the default order.
    """
    first = by[0].best_first()
    if count <= limit:
        return first
    picked: dict[int, None] = {}
    known = [order.best_first()[: int((~np.isnan(order.values)).sum())] for order in by]
    depth = 0
    while len(picked) < limit - limit // 3 and depth < count:
        for rows in known:
            if depth < len(rows):
                picked[int(rows[depth])] = None
                picked[int(rows[-1 - depth])] = None
        depth += 1
    rows_in_turn = list(picked)[: limit - limit // 3]
    chosen = set(rows_in_turn)
    rest = [int(row) for row in first if int(row) not in chosen]
    free = limit - len(chosen)
    chosen.update(rest[place] for place in np.linspace(0, len(rest) - 1, free).round().astype(int))
    return np.array([row for row in first if int(row) in chosen], dtype=np.int64)


class Thumbnails:
    """Pictures of a table or of comparisons as data URIs, each read once, until the page's budget is spent."""

    def __init__(self) -> None:
        self._pictures, self.left = Pictures(Path.cwd()), BUDGET
        self._held: dict[str, tuple[str, int, int] | None] = {}

    def at(self, path: str | None) -> tuple[str, int, int] | None:
        """Data URI, width and height of what lies at a table's `path`; None for what cannot be read from there."""
        if path is None:
            return None
        try:
            return self.of(self._pictures.ref(path, path))
        except DataError:
            return None

    def of(self, image: ImageRef) -> tuple[str, int, int] | None:
        """The same of a comparison's picture."""
        if image.name not in self._held:
            try:
                picture = decode(image.read())
            except DataError:
                self._held[image.name] = None
            else:
                uri = inlined(picture, SIDE, LOSSLESS)
                self.left -= len(uri)
                self._held[image.name] = (uri, *picture.size)
        return self._held[image.name]


def picture(found: tuple[str, int, int] | None, alt: str) -> str:
    """The thumbnail as HTML, or a frame that says that there is none."""
    if found is None:
        return f'<div class="missing" role="img" aria-label="{escape(alt)}, not readable">not readable<br>where it lay</div>'
    uri, width, height = found
    return f'<img src="{uri}" alt="{escape(alt)}" width="{width}" height="{height}" decoding="async">'


@dataclass(frozen=True)
class Captions:
    """What stands under a picture besides its scores."""

    prompts: Sequence[str | None]
    paths: Sequence[str | None]
    generators: Sequence[str | None]
    seeds: Sequence[int | None]

    @classmethod
    def of(cls, table: ScoreTable) -> Captions:
        names = ("prompt", "path", "generator", "seed")
        there = table.data.column_names
        return cls(*(table.data.column(name).to_pylist() if name in there else [None] * len(table) for name in names))

    def html(self, row: int) -> str:
        prompt = self.prompts[row] or "(no prompt)"
        made = [shortened(str(self.generators[row]), 60)] if self.generators[row] is not None else []
        made += [f"seed {self.seeds[row]}"] if self.seeds[row] is not None else []
        said = f'<span class="made">{escape(", ".join(made))}</span>' if made else ""
        return f'<span class="prompt" title="{escape(shortened(prompt, 600))}">{escape(shortened(prompt, 300))}</span>{said}'


def gallery(table: ScoreTable, by: Sequence[Order], rows: Sequence[int], thumbnails: Thumbnails) -> tuple[str, int]:
    """Cards of these rows, as many as the budget allows and at least one, and how many these are."""
    captions = Captions.of(table)
    cards: list[str] = []
    for row in map(int, rows):
        if thumbnails.left <= 0 and cards:
            break
        found = thumbnails.at(captions.paths[row])
        alt = f"picture for: {shortened(captions.prompts[row] or 'no prompt', 200)}"
        cards.append(f'<li class="scored">{picture(found, alt)}{captions.html(row)}{_values(by, row)}</li>')
    return f'<ul class="gallery" id="gallery">{"".join(cards)}</ul>', len(cards)


def _values(by: Sequence[Order], row: int) -> str:
    """One line a reward: raw and calibrated."""
    kinds = [kind for kind in ("raw", "calibrated") if any(order.kind == kind for order in by)]
    cells: dict[str, dict[str, str]] = {}
    for place, order in enumerate(by):
        value = float(order.values[row])
        exact = "" if value != value else repr(value)
        shown = f'<data data-key="{place}" value="{exact}">{figure(value)}</data>'
        cells.setdefault(order.reward or order.kind, {})[order.kind if order.reward else "calibrated"] = shown
    head = "".join(f"<th>{kind}</th>" for kind in kinds) if len(kinds) > 1 else ""
    body = "".join(f"<tr><th>{escape(shortened(name, 40))}</th>{_cells(found, kinds)}</tr>" for name, found in cells.items())
    return f'<table class="values">{f"<thead><tr><th></th>{head}</tr></thead>" if head else ""}<tbody>{body}</tbody></table>'


def _cells(found: dict[str, str], kinds: Sequence[str]) -> str:
    if len(kinds) == 1:
        return f"<td>{next(iter(found.values()))}</td>"
    return "".join(f"<td>{found.get(kind, '')}</td>" for kind in kinds)


def apart(table: ScoreTable, thumbnails: Thumbnails, most: int) -> tuple[str, int]:
    """The pictures on which the rewards differ most, each reward's value beside its place on one scale."""
    scores, calibrated = comparable(table)
    known = (~np.isnan(scores)).sum(1) >= 2
    filled = [np.where(np.isnan(scores), bound, scores) for bound in (-np.inf, np.inf)]
    gap = np.where(known, filled[0].max(1, initial=-np.inf) - filled[1].min(1, initial=np.inf), -np.inf)
    if "disagreement" in table.data.column_names:
        told = table.numbers("disagreement")
        gap = np.where(np.isnan(told), -np.inf, told)
    rows = [int(row) for row in np.argsort(-gap, kind="stable")[:most] if gap[row] > 0]
    captions = Captions.of(table)
    raw = {name: table.raw(name) for name in table.rewards}
    reach = 1.0 if calibrated else max(2.0, float(np.nanmax(np.abs(scores[rows]), initial=0.0)) if rows else 2.0)
    cards = []
    for row in rows:
        lines = []
        for place, name in enumerate(table.rewards):
            value = float(scores[row, place])
            at = value if calibrated else (value / reach + 1) / 2
            said = figure(value) if calibrated else f"{value:+.1f} sd".replace("-", "−")
            lane = "" if value != value else _lane(at, f"{name}: {said}")
            lines.append(
                f'<tr><th title="{escape(name)}">{escape(shortened(name, 40))}</th>'
                f"<td>{lane}</td><td>{figure(float(raw[name][row]))}</td>"
                f"<td>{said if value == value else '—'}</td></tr>"
            )
        scale = "calibrated" if calibrated else "standardised"
        alt = f"picture for: {shortened(captions.prompts[row] or 'no prompt', 200)}"
        cards.append(
            f'<li class="scored">{picture(thumbnails.at(captions.paths[row]), alt)}{captions.html(row)}<table class="values">'
            f"<thead><tr><th></th><th></th><th>raw</th><th>{scale}</th></tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></li>"
        )
    return f'<ul class="gallery apart">{"".join(cards)}</ul>', len(cards)


def _lane(at: float, label: str) -> str:
    """A dot on a rail from worst to best, coloured by the half in which it lies."""
    x = 5 + 90 * min(max(at, 0.0), 1.0)
    look = "up" if at >= 0.5 else "down"
    return (
        f'<svg class="lane" viewBox="0 0 100 12" role="img" aria-label="{escape(label)}"><line class="rail" x1="5" x2="95" '
        f'y1="6" y2="6"/><line class="zero" x1="50" x2="50" y1="2" y2="10"/>'
        f'<circle class="{look}" cx="{x:.1f}" cy="6" r="4"/></svg>'
    )
