"""Charts as inline SVG: lines over steps, and a forest plot of estimates with intervals. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from flowalign.report.document import shortened

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44
MOST_POINTS = 240  # a line with more is averaged into this many bins: the eye sees no more, the page stays small


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, its CSS class, its (step, value) points, whether points are dotted, and intervals."""

    name: str
    look: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    whiskers: Sequence[tuple[float, float, float]] = ()
    """(step, low, high) of intervals."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about as many as asked for: steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A tick label: thousands separated, no trailing zeros."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:g}".replace("-", "−")


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means over bins of consecutive ones."""
    size = math.ceil(len(points) / MOST_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)] if size else []
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def line_chart(
    title: str,
    note: str,
    lines: Sequence[Line],
    *,
    span: tuple[float, float] | None = None,
    at: float | None = None,
    across: str = "optimizer step",
    point: str = "step",
) -> str:
    """A figure with a legend. `span` fixes the vertical axis; `at` draws a horizontal line that means "no difference".

    across: what the horizontal axis says; point: what its value is called where a dot is pointed at.
    """
    lines = [replace(line, points=thin(line.points)) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = (
        [y for line in lines for _, y in line.points]
        + [y for line in lines for _, *ends in line.whiskers for y in ends]
        + ([] if at is None else [at])
    )
    places, up = ticks(min(xs), max(xs)), ticks(*(span or (min(ys), max(ys))))
    counted = max(xs) - min(xs) < len(places) and all(float(x).is_integer() for x in xs)  # few steps, none of them half
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def px(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM)

    parts = []
    floor = HEIGHT - BOTTOM
    for y in up:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in places:
        if left <= x <= right and (not counted or float(x).is_integer()):
            parts.append(f'<line class="tick" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{floor}" y2="{floor + 5}"/>')
            parts.append(f'<text x="{px(x):.1f}" y="{floor + 19}" text-anchor="middle">{number(x)}</text>')
    if at is not None:
        parts.append(f'<line class="neutral" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(at):.1f}" y2="{py(at):.1f}"/>')
    for line in lines:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points)
        parts += [
            f'<line class="curve {line.look}" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(low):.1f}" y2="{py(high):.1f}"/>'
            for x, low, high in line.whiskers
        ]
        parts.append(f'<polyline class="curve {line.look}" points="{path}"/>')
        if line.dots or len(line.points) == 1:
            parts += [
                f'<circle class="dot {line.look}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"><title>{escape(line.name)}, '
                f"{escape(point)} {number(round(x, 6))}: {y:.4g}</title></circle>"
                for x, y in line.points
            ]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>')
    ends = "; ".join(f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines)
    legend = "".join(f'<span class="key {line.look}">{escape(line.name)}</span>' for line in lines)
    label = escape(f"{title}: {ends}")
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong> '
        f'<span class="muted">{escape(note)}</span></figcaption><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def forest(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Win rates `{value, low, high}` in [0, 1], one row per judge, against the line at one half."""
    return shares(
        rows,
        left_says="base is better",
        right_says="aligned is better",
        axis="win rate of the aligned model, 95 % interval",
        about="Win rates",
    )


def shares(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, left_says: str, right_says: str, axis: str, about: str | None = None
) -> str:
    """Shares `{value, low, high}` in [0, 1] with intervals, one row each, against the line at one half.

    about: what the chart is called where it is not seen; the axis if left out.
    """
    width, left, right, row, top = 760, 160, 170, 40, 28
    bottom = top + row * len(rows)

    def px(x: float) -> float:
        return left + x * (width - left - right)

    parts = [f'<line class="neutral" x1="{px(0.5):.1f}" x2="{px(0.5):.1f}" y1="{top - 6}" y2="{bottom}"/>']
    parts.append(f'<text x="{px(0.5) - 8:.1f}" y="14" text-anchor="end">← {escape(left_says)}</text>')
    parts.append(f'<text x="{px(0.5) + 8:.1f}" y="14">{escape(right_says)} →</text>')
    for x in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="tick" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{px(x):.1f}" y="{bottom + 20}" text-anchor="middle">{100 * x:g} %</text>')
    parts.append(f'<line class="tick" x1="{left}" x2="{width - right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{px(0.5):.1f}" y="{bottom + 40}" text-anchor="middle">{escape(axis)}</text>')
    told = []
    for index, (name, share) in enumerate(rows):
        y = top + row * (index + 0.5)
        look = "better" if share["low"] > 0.5 else "worse" if share["high"] < 0.5 else "open"
        words = f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
        told.append(f"{name} {words}")
        parts.append(f'<text class="strong" x="{left - 16}" y="{y + 5}" text-anchor="end">{escape(shortened(name, 22))}</text>')
        parts.append(
            f'<line class="whisker {look}" x1="{px(share["low"]):.1f}" x2="{px(share["high"]):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<circle class="dot {look}" cx="{px(share["value"]):.1f}" cy="{y}" r="5.5"/>')
        parts.append(f'<text class="strong" x="{width - right + 16}" y="{y + 5}">{words}</text>')
    label = escape(f"{about or axis}: {'; '.join(told)}")
    return f'<svg class="forest" viewBox="0 0 {width} {bottom + 46}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
