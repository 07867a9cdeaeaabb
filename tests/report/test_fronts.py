from __future__ import annotations

import re
from dataclasses import asdict
from xml.etree import ElementTree

import numpy as np
import pytest

from flowalign.evaluate.pareto import hypervolume, multi_objective
from flowalign.report.fronts import Course, Front, course_chart, front_chart, front_charts


def at(value: float, half: float = 0.0) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def front(name: str, points: list[tuple[float, ...]], half: float = 0.0) -> Front:
    return Front(name, [[at(value, half) for value in point] for point in points])


def svg(html: str) -> ElementTree.Element:
    found = re.search(r"<svg.*?</svg>", html, re.S)
    assert found
    return ElementTree.fromstring(found[0])  # and well formed


def circles(html: str, look: str) -> list[tuple[float, float]]:
    return [
        (float(each.attrib["cx"]), float(each.attrib["cy"]))
        for each in svg(html).iter("circle")
        if each.attrib["class"] == f"dot {look}"
    ]


def test_more_of_the_first_objective_is_further_right_and_of_the_second_further_up() -> None:
    (x0, y0), (x1, y1), (x2, y2) = circles(
        front_chart("Front", "", [front("policy", [(0.1, 0.9), (0.3, 0.5), (0.7, 0.1)])], ["a", "b"]), "one"
    )
    assert (x2 - x1) / (x1 - x0) == pytest.approx(2, abs=0.02)
    assert (y2 - y1) / (y1 - y0) == pytest.approx(1, abs=0.02)
    assert x0 < x1
    assert y0 < y1, "lower on the page"


def test_the_line_encloses_what_the_hypervolume_measures() -> None:
    points = [(1.0, 8.0), (2.0, 9.0), (4.0, 5.0), (3.0, 4.0), (8.0, 2.0), (0.0, 0.0), (8.0, 2.0)]
    html = front_chart("Front", "", [front("policy", points)], ["a", "b"])
    line = next(each for each in svg(html).iter("polyline")).attrib["points"]
    corners = [tuple(float(number) for number in corner.split(",")) for corner in line.split()]
    dots = circles(html, "one")
    (left, floor), (right, _), (_, top) = dots[5], dots[4], dots[1]  # places of (0, 0), x = 8 and y = 9
    shown = [((x - left) / (right - left) * 8, (floor - y) / (floor - top) * 9) for x, y in corners]
    area, before = 0.0, 0.0
    for (_, y0), (x1, y1) in zip([(0.0, shown[0][1]), *shown], shown, strict=False):
        area += (x1 - before) * min(y0, y1) if x1 > before else 0.0
        before = max(before, x1)
    assert area == pytest.approx(hypervolume(points, [0, 0]), rel=0.01)


def test_whiskers_are_as_long_as_the_intervals() -> None:
    html = front_chart("Front", "", [front("policy", [(0.0, 0.0), (1.0, 1.0)], half=0.25)], ["a", "b"])
    (x0, y0), (x1, y1) = circles(html, "one")
    lines = [each.attrib for each in svg(html).iter("line") if "whisker" in each.attrib["class"]]
    assert len(lines) == 4
    assert float(lines[0]["x2"]) - float(lines[0]["x1"]) == pytest.approx((x1 - x0) / 2, abs=0.2)
    assert float(lines[1]["y1"]) - float(lines[1]["y2"]) == pytest.approx((y0 - y1) / 2, abs=0.2)


def test_a_chart_for_every_two_objectives_and_names_are_escaped() -> None:
    series = [front("<policy>", [(0, 1, 2), (2, 1, 0)]), front("soup & co", [(0, 0, 1), (1, 0, 0)])]
    html = front_charts("Fronts", "note", series, ["a<b", "style", "sharp"], base=[at(0.0), at(0.1), at(0.2)])
    assert html.count("<figure") == 3
    assert "a&lt;b, style" in html
    assert "&lt;policy&gt; from (0, 1) to (2, 1)" in html
    assert "soup &amp; co" in html
    assert "base at (0.1, 0.2)" in html
    assert "a<b" not in html


def test_series_differ_by_shape_as_well() -> None:
    series = [front(f"policy {place}", [(place, 1.0), (1.0, place)]) for place in range(5)]
    root = svg(front_chart("Fronts", "", series, ["a", "b"]))
    marks = {each.attrib["class"]: each.tag for each in root.iter() if each.attrib.get("class", "").startswith("dot ")}
    assert marks == {"dot one": "circle", "dot two": "rect", "dot three": "path", "dot four": "path", "dot plain": "circle"}
    paths = [each.attrib["d"] for each in root.iter("path")]
    assert len(paths) == 4
    assert len({path[path.index("l") :] for path in paths}) == 2


def test_what_was_measured_is_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    weights = np.stack([np.linspace(0, 1, 5), np.linspace(1, 0, 5)], axis=1)
    scores = weights + 0.1 * rng.normal(size=(40, 5, 2))
    found = asdict(multi_objective(scores, weights, [f"p{i}" for i in range(40)], reference=[0, 0], resamples=100))
    labels = [f"w = {w[0]:g}, {w[1]:g}" for w in weights]
    html = front_chart("Front", "", [Front("policy", found["points"], labels)], ["a", "b"])
    titles = [each.text or "" for each in svg(html).iter("title")]
    assert len(titles) == 5
    assert titles[1].startswith(f"policy, w = 0.25, 0.75: a {found['points'][1][0]['value']:.3g} [")


@pytest.mark.parametrize("rounds", [1, 2, 5, 40])
def test_a_hypervolume_over_rounds(rounds: int) -> None:
    course = Course("policy", [(index, at(0.2 + 0.01 * index, 0.02)) for index in range(rounds)])
    html = course_chart("Hypervolume", "", [course], at=0.0)
    dots = circles(html, "one")
    assert len(dots) == rounds
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    assert [y for _, y in dots] == sorted((y for _, y in dots), reverse=True)
    whiskers = [each for each in svg(html).iter("line") if "whisker" in each.attrib["class"]]
    neutral = next(each for each in svg(html).iter("line") if each.attrib["class"] == "neutral")
    assert len(whiskers) == rounds
    assert all(float(neutral.attrib["y1"]) > float(each.attrib["y1"]) for each in whiskers)
    texts = [each.text for each in svg(html).iter("text")]
    assert "round" in texts
    assert str(rounds - 1) in texts
    assert "policy from 0.2 [0.18, 0.22]" in html
