"""Charts of several objectives as inline SVG: fronts of two objectives with intervals, and an estimate over rounds.

Estimates are mappings `{value, low, high}`, as `dataclasses.asdict` of `evaluate.compare.Estimate` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations

from flowalign.report.charts import number, ticks
from flowalign.report.diagrams import caption
from flowalign.report.document import figure, shortened

LOOKS = ("one", "two", "three", "four", "plain")
"""CSS classes of series in their order; each has a colour and a mark of its own."""
WIDTH, HEIGHT = 520, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 14, 48

Shown = Mapping[str, float]


@dataclass(frozen=True)
class Front:
    """One policy's points, from the first weight to the last."""

    name: str
    points: Sequence[Sequence[Shown]]
    """`[M][K]` estimates."""
    labels: Sequence[str] = ()
    """`[M]` what each point is, such as its weights; shown when pointed at."""


@dataclass(frozen=True)
class Course:
    """One quantity over rounds: (round, estimate)."""

    name: str
    points: Sequence[tuple[float, Shown]]


@dataclass(frozen=True)
class _Frame:
    """Axes: numbers to places on the page."""

    across: Sequence[float]
    up: Sequence[float]
    height: int

    def x(self, value: float) -> float:
        return LEFT + (value - self.across[0]) / (self.across[-1] - self.across[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        floor = self.height - BOTTOM
        return floor - (value - self.up[0]) / (self.up[-1] - self.up[0]) * (floor - TOP)

    def axes(self, below: str, beside: str, grid_across: bool = True) -> list[str]:
        floor = self.height - BOTTOM
        parts = []
        for value in self.up:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in self.across:
            x = self.x(value)
            look, y1, y2 = ("grid", TOP, floor) if grid_across else ("tick", floor, floor + 5)
            parts.append(f'<line class="{look}" x1="{x:.1f}" x2="{x:.1f}" y1="{y1}" y2="{y2}"/>')
            parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{number(value)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(shortened(below, 60))}</text>')
        if beside:
            side = f"translate(14 {(TOP + floor) / 2}) rotate(-90)"
            parts.append(f'<text transform="{side}" text-anchor="middle">{escape(shortened(beside, 44))}</text>')
        return parts


def front_chart(
    title: str,
    note: str,
    series: Sequence[Front],
    objectives: Sequence[str],
    *,
    axes: tuple[int, int] = (0, 1),
    base: Sequence[Shown] | None = None,
) -> str:
    """Fronts over two of K `objectives`, up and right is better; whiskers are the intervals of both.

    A step line runs along the points of each policy that none of its own dominates in these two; the area below it is what a
    hypervolume of two objectives measures. `base` `[K]` is one point more. At most five policies are told apart.
    """
    first, second = axes
    shown = [Front("base", [base])] if base is not None else []
    everything = [point for front in (*series, *shown) for point in front.points]
    across, up = (
        ticks(min(point[axis]["low"] for point in everything), max(point[axis]["high"] for point in everything))
        for axis in axes
    )
    frame = _Frame(across, up, HEIGHT)
    parts, told, keys = frame.axes(objectives[first], objectives[second]), [], []
    for place, front in enumerate(series):
        look = LOOKS[min(place, len(LOOKS) - 1)]
        steps = _stairs([(point[first]["value"], point[second]["value"]) for point in front.points])
        line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in steps)
        parts.append(f'<polyline class="curve {look} thin" points="{line}"/>')
        parts += [part for point in front.points for part in _whiskers(frame, point[first], point[second], look)]
        for index, point in enumerate(front.points):
            said = f"{objectives[first]} {words(point[first])}, {objectives[second]} {words(point[second])}"
            name = f"{front.name}, {front.labels[index]}" if front.labels else front.name
            parts.append(_mark(frame.x(point[first]["value"]), frame.y(point[second]["value"]), look, f"{name}: {said}"))
        keys.append((look, front.name))
        ends = [front.points[0], front.points[-1]]
        told.append(f"{front.name} from " + " to ".join(f"({_pair(point, first, second)})" for point in ends))
    if base is not None:
        x, y = frame.x(base[first]["value"]), frame.y(base[second]["value"])
        parts += _whiskers(frame, base[first], base[second], "plain")
        parts.append(_mark(x, y, "plain", f"base: {objectives[first]} {words(base[first])}"))
        keys.append(("plain", "base"))
        told.append(f"base at ({_pair(base, first, second)})")
    return _chart(title, note, keys, parts, HEIGHT, f"{title}, {objectives[first]} and {objectives[second]}: {'; '.join(told)}")


def front_charts(
    title: str, note: str, series: Sequence[Front], objectives: Sequence[str], *, base: Sequence[Shown] | None = None
) -> str:
    """One chart for every two objectives, in a grid."""
    both = list(combinations(range(len(objectives)), 2))
    named = [title if len(both) == 1 else f"{title}: {objectives[a]}, {objectives[b]}" for a, b in both]
    charts = [front_chart(name, note, series, objectives, axes=pair, base=base) for name, pair in zip(named, both, strict=True)]
    return f'<div class="charts">{"".join(charts)}</div>'


def course_chart(
    title: str, note: str, series: Sequence[Course], *, axis: str = "round", at: float | None = None, height: int = 280
) -> str:
    """Estimates over rounds, such as a hypervolume: a line through the values, whiskers for the intervals.

    `at` draws a horizontal line that means "no difference". Rounds are whole numbers and are the ticks.
    """
    points = [point for course in series for point in course.points]
    edges = [value for _, each in points for value in (each["low"], each["high"])] + ([] if at is None else [at])
    rounds = sorted({x for x, _ in points})
    gap = max(1, math.ceil(len(rounds) / 12))
    shown = rounds[::gap] if len(rounds) > 1 else [rounds[0] - 1, rounds[0], rounds[0] + 1]
    if shown[-1] < rounds[-1]:
        shown.append(rounds[-1])
    frame = _Frame(shown, ticks(min(edges), max(edges)), height)
    parts, told, keys = frame.axes(axis, "", grid_across=False), [], []
    if at is not None:
        y = frame.y(at)
        parts.append(f'<line class="neutral" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for place, course in enumerate(series):
        look = LOOKS[min(place, len(LOOKS) - 1)]
        line = " ".join(f"{frame.x(x):.1f},{frame.y(each['value']):.1f}" for x, each in course.points)
        parts.append(f'<polyline class="curve {look}" points="{line}"/>')
        for x, each in course.points:
            parts.append(
                f'<line class="whisker {look} thin" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" '
                f'y1="{frame.y(each["low"]):.1f}" y2="{frame.y(each["high"]):.1f}"/>'
            )
            parts.append(_mark(frame.x(x), frame.y(each["value"]), look, f"{course.name}, {axis} {number(x)}: {words(each)}"))
        keys.append((look, course.name))
        told.append(f"{course.name} from {words(course.points[0][1])} to {words(course.points[-1][1])}")
    return _chart(title, note, keys, parts, height, f"{title}: {'; '.join(told)}")


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the outline of what `points` dominate, from the left to the right: each step falls at a point."""
    alive = [(x, y) for x, y in set(points) if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)]
    alive.sort()
    corners: list[tuple[float, float]] = []
    for x, y in alive:
        corners += [(corners[-1][0], y)] if corners else []
        corners.append((x, y))
    return corners


def _whiskers(frame: _Frame, across: Shown, up: Shown, look: str) -> list[str]:
    x, y = frame.x(across["value"]), frame.y(up["value"])
    return [
        f'<line class="whisker {look} thin" x1="{frame.x(across["low"]):.1f}" x2="{frame.x(across["high"]):.1f}" '
        f'y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<line class="whisker {look} thin" x1="{x:.1f}" x2="{x:.1f}" '
        f'y1="{frame.y(up["low"]):.1f}" y2="{frame.y(up["high"]):.1f}"/>',
    ]


def _mark(x: float, y: float, look: str, says: str) -> str:
    """A circle, square, diamond or triangle, so that series differ without their colours too."""
    shape = {
        "two": f'<rect class="dot {look}" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9">',
        "three": f'<path class="dot {look}" d="M{x:.1f} {y - 6.3:.1f}l6.3 6.3l-6.3 6.3l-6.3 -6.3z">',
        "four": f'<path class="dot {look}" d="M{x:.1f} {y - 6:.1f}l5.8 10.4h-11.6z">',
    }.get(look, f'<circle class="dot {look}" cx="{x:.1f}" cy="{y:.1f}" r="5">')
    return f"{shape}<title>{escape(says)}</title></{shape[1:].split()[0]}>"


def _pair(point: Sequence[Shown], first: int, second: int) -> str:
    return f"{figure(point[first]['value'])}, {figure(point[second]['value'])}"


def words(each: Shown) -> str:
    """An estimate for people, such as 0.2 [0.18, 0.22]."""
    return f"{figure(each['value'])} [{figure(each['low'])}, {figure(each['high'])}]"


def _chart(title: str, note: str, keys: Sequence[tuple[str, str]], parts: Sequence[str], height: int, label: str) -> str:
    legend = "".join(f'<span class="key {look}">{escape(name)}</span>' for look, name in keys)
    return (
        f'<figure class="chart">{caption(title, note)}<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )
