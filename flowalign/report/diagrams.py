"""Diagrams of scores as inline SVG: histograms, matrices of agreement, reliability, and shares with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flowalign.report.charts import number, ticks
from flowalign.report.document import figure, shortened

BINS = 30
Z = 1.959963984540054  # of a two-sided 95 % interval


def caption(title: str, note: str) -> str:
    """Of a chart: what it shows, and how to read it."""
    return f'<figcaption><strong>{escape(title)}</strong> <span class="muted">{escape(note)}</span></figcaption>'


def histogram(title: str, note: str, values: ArrayLike, *, at: float | None = None, unit: str = "pictures") -> str:
    """Counts of the finite `values` in BINS bins of one width, with a line at the median; `at` draws one that means "even"."""
    values = np.asarray(values, dtype=np.float64)
    known = values[np.isfinite(values)]
    if not len(known):
        return f'<figure class="chart">{caption(title, note)}<p class="muted">No value.</p></figure>'
    low, high = float(known.min()), float(known.max())
    if at is not None:
        low, high = min(low, at), max(high, at)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    counts, edges = np.histogram(known, bins=BINS, range=(low, high))
    return bars(title, note, counts.tolist(), edges.tolist(), float(np.median(known)), at=at, unit=unit)


def bars(
    title: str,
    note: str,
    counts: Sequence[int],
    edges: Sequence[float],
    median: float,
    *,
    at: float | None = None,
    unit: str = "pictures",
) -> str:
    """A histogram whose `counts` `[n]` between `edges` `[n + 1]` are known already."""
    low, high = (min(edges[0], at), max(edges[-1], at)) if at is not None else (edges[0], edges[-1])
    width, height, left, right, top, bottom = 520, 220, 56, 12, 22, 30
    across, up = ticks(low, high), ticks(0, max(counts), 3)

    def px(x: float) -> float:
        return left + (x - low) / (high - low) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - y / up[-1] * (height - top - bottom)

    parts = []
    for y in up:
        if y == int(y):
            parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
            parts.append(f'<text x="{left - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in across:
        if low <= x <= high:
            parts.append(f'<text x="{px(x):.1f}" y="{height - 10}" text-anchor="middle">{number(x)}</text>')
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            wide = max(px(end) - px(start) - 1, 0.5)
            parts.append(
                f'<rect class="bar" x="{px(start) + 0.5:.1f}" y="{py(count):.1f}" width="{wide:.1f}" '
                f'height="{height - bottom - py(count):.1f}">'
                f"<title>{figure(start)} to {figure(end)}: {count} {unit}</title></rect>"
            )
    if at is not None:
        parts.append(f'<line class="neutral" x1="{px(at):.1f}" x2="{px(at):.1f}" y1="{top}" y2="{height - bottom}"/>')
    parts.append(f'<line class="median" x1="{px(median):.1f}" x2="{px(median):.1f}" y1="{top - 6}" y2="{height - bottom}"/>')
    anchor = "start" if px(median) < width / 2 else "end"
    shift = 6 if anchor == "start" else -6
    words = f"median {figure(median)}"
    parts.append(f'<text class="strong" x="{px(median) + shift:.1f}" y="{top - 8}" text-anchor="{anchor}">{words}</text>')
    filled = [place for place, count in enumerate(counts) if count]
    span = f"from {figure(edges[filled[0]])} to {figure(edges[filled[-1] + 1])}"
    label = escape(f"{title}: {sum(counts)} {unit} {span}, {words}")
    head = f'<figure class="chart">{caption(title, note)}'
    return f'{head}<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'


def matrix(title: str, note: str, names: Sequence[str], values: ArrayLike) -> str:
    """A symmetric matrix `[K, K]` of correlations in [-1, 1] as shaded cells with their numbers."""
    values = np.asarray(values, dtype=np.float64)
    cell, left, top = 62, 150, 96
    shown = [shortened(name, 20) for name in names]
    width, height = left + cell * len(names) + 70, top + cell * len(names) + 6
    parts = []
    told = []
    for i, name in enumerate(shown):
        middle = top + cell * (i + 0.5)
        parts.append(f'<text class="strong" x="{left - 10}" y="{middle + 5}" text-anchor="end">{escape(name)}</text>')
        x = left + cell * (i + 0.5)
        parts.append(f'<text class="strong" transform="translate({x} {top - 10}) rotate(-35)">{escape(name)}</text>')
        for j in range(len(names)):
            value = float(values[i, j])
            place = f'x="{left + cell * j + 1}" y="{top + cell * i + 1}" width="{cell - 2}" height="{cell - 2}" rx="5"'
            if i == j:
                parts.append(f'<rect class="blank" {place}/>')
                continue
            look = "agree" if value >= 0 else "oppose"
            strength = 0.0 if math.isnan(value) else 0.06 + 0.74 * min(abs(value), 1)
            parts.append(f'<rect class="cell {look}" fill-opacity="{strength:.2f}" {place}/>')
            said = "—" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # no −0.00
            ink = "strong on" if strength > 0.5 else "strong"
            parts.append(
                f'<text class="{ink}" x="{left + cell * (j + 0.5)}" y="{middle + 5}" text-anchor="middle">{said}</text>'
            )
            if j > i:
                told.append(f"{names[i]} and {names[j]} {said}")
    label = escape(f"{title}: {'; '.join(told)}")
    return (
        f'<figure class="chart">{caption(title, note)}<div class="scroll">'
        f'<svg class="matrix" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg></div></figure>'
    )


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share seen in `count` trials (Wilson 1927), in [0, 1]."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(max(share * (1 - share), 0) / count + Z * Z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def reliability(title: str, note: str, after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] = ()) -> str:
    """Dots `{predicted, observed, count}` and, where they have them, their `low` and `high`; else Wilson's interval."""
    side, left, right, top, bottom = 346, 52, 24, 12, 46
    height = side - left - right + top + bottom

    def px(x: float) -> float:
        return left + x * (side - left - right)

    def py(y: float) -> float:
        return height - bottom - y * (height - top - bottom)

    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{px(0)}" x2="{px(1)}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{py(value) + 4:.1f}" text-anchor="end">{100 * value:g} %</text>')
        parts.append(f'<text x="{px(value):.1f}" y="{height - bottom + 18}" text-anchor="middle">{100 * value:g} %</text>')
    parts.append(f'<line class="neutral" x1="{px(0)}" y1="{py(0):.1f}" x2="{px(1)}" y2="{py(1):.1f}"/>')
    parts.append(
        f'<text x="{px(0.5)}" y="{height - 8}" text-anchor="middle">probability said; up: share that was preferred</text>'
    )
    told = []
    for look, name, dots in (("plain", "before", before), ("one", "after", after)):
        line = " ".join(f"{px(dot['predicted']):.1f},{py(dot['observed']):.1f}" for dot in dots)
        parts.append(f'<polyline class="curve {look} thin" points="{line}"/>' if dots else "")
        for dot in dots:
            low, high = (dot["low"], dot["high"]) if {"low", "high"} <= dot.keys() else wilson(dot["observed"], dot["count"])
            x = px(dot["predicted"])
            if look == "one":
                parts.append(
                    f'<line class="whisker {look} thin" x1="{x:.1f}" x2="{x:.1f}" y1="{py(low):.1f}" y2="{py(high):.1f}"/>'
                )
            said = f"said {100 * dot['predicted']:.0f} %, was {100 * dot['observed']:.0f} % of {dot['count']} pairs"
            parts.append(
                f'<circle class="dot {look}" cx="{x:.1f}" cy="{py(dot["observed"]):.1f}" r="4.5">'
                f"<title>{name}: {said}</title></circle>"
            )
            told += [said] if look == "one" else []
    keys = [("one", "after calibration")] + ([("plain", "before")] if before else [])
    legend = "".join(f'<span class="key {look}">{name}</span>' for look, name in keys)
    label = escape(f"{title}: {'; '.join(told)}")
    return (
        f'<figure class="chart reliability">{caption(title, note)}'
        f'<div class="legend">{legend}</div><svg viewBox="0 0 {side} {height}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )
