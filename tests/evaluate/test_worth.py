"""Ways to get a picture: their costs and qualities written out, and what is said of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from flowalign.errors import DataError
from flowalign.evaluate.worth import Arm, Scored, Seconds, affordable, arms, beats, loses, rows, standing
from flowalign.report.worth import verdict

SECONDS = Seconds(draw=2.0, flow=0.5, choose=0.1)
ABOUT: dict[str, Any] = {"identity": {"value": 0.9}}


def made(judged: dict[str, Any], rewards: dict[str, Any]) -> Scored:
    def arrays(pairs: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(np.array(side, dtype=float) for side in pair) for name, pair in pairs.items()}

    return Scored(arrays(judged), arrays(rewards), SECONDS)


def toy() -> Scored:
    """Two captions, two seeds: the flow makes all but one Fluent, and loses a tenth of caption match."""
    judged = {
        "style": ([[0.9, 0.1], [0.2, 0.3]], [[0.9, 0.8], [0.7, 0.4]]),
        "caption_match": ([[0.5, 0.3], [0.4, 0.6]], [[0.4, 0.2], [0.3, 0.5]]),
    }
    return made(judged, {"liking": ([[1.0, 0.0], [0.0, 2.0]], [[0.0, 5.0], [1.0, 0.0]])})


def by_name(found: list[Arm]) -> dict[str, Arm]:
    return {arm.name: arm for arm in found}


def test_costs_and_means_are_the_formulas() -> None:
    found = by_name(arms(toy(), (1, 2, 4)))
    expected = {  # calls; seconds; share in the style; caption match
        "generator": (1, 2.0, 1 / 4, (0.5 + 0.3 + 0.4 + 0.6) / 4),
        "flow": (1, 2.5, 3 / 4, (0.4 + 0.2 + 0.3 + 0.5) / 4),
        "best of 2 by liking": (2, 2 * 2.1, 1 / 2, (0.5 + 0.6) / 2),
        "best of 2 by liking, then flow": (2, 2 * 2.1 + 0.5, 1 / 2, (0.4 + 0.5) / 2),
        "flow, then best of 2 by liking": (2, 2 * 2.6, 1.0, (0.2 + 0.3) / 2),
    }
    assert found.keys() == expected.keys()  # four cannot be had from two, and one reward alone is no mean of several
    for name, (calls, seconds, style, caption) in expected.items():
        arm = found[name]
        assert (arm.calls, arm.seconds) == (calls, pytest.approx(seconds))
        assert arm.quality["style"].value == pytest.approx(style)
        assert arm.quality["caption_match"].value == pytest.approx(caption)
        assert arm.over_flow["caption_match"].value == pytest.approx(caption - 0.35)
    assert rows(list(found.values()))[2]["quality"]["style"][0] == pytest.approx(0.5)


def test_both_is_the_mean_of_standardised_rewards() -> None:
    before = {"a": np.array([[1.0, 3.0]]), "b": np.array([[40.0, 0.0]])}
    scored = made({"style": ([[0.0, 1.0]], [[0.0, 1.0]])}, {name: (x, x + 1) for name, x in before.items()})
    plain, moved = scored.reward("both")
    assert plain[0] == pytest.approx([(-1 + 1) / 2, (1 - 1) / 2])
    assert moved[0] == pytest.approx([1 / 2 * (1 / 1 + 1 / 20)] * 2)
    assert [arm.chooser for arm in arms(scored) if arm.way == "best of n"] == [None, "a", "b", "both"]


@pytest.mark.parametrize(("seconds", "names"), [(2.5, ["generator"]), (4.2, ["best of 2 by liking"]), (1.0, ["generator"])])
def test_what_as_many_seconds_buy(seconds: float, names: list[str]) -> None:
    assert [arm.name for arm in affordable(arms(toy()), seconds)] == names


def many(style: tuple[float, float], caption: tuple[float, float], better: bool) -> Scored:
    """Thirty captions of two seeds; before and after the flow; the second seed is the better one where one is."""
    rng, gain = np.random.default_rng(0), np.array([0.0, 1.0 if better else 0.0])
    noise = rng.normal(0, 0.01, (30, 2))
    judged = {
        "style": (np.clip(style[0] + gain, 0, 1) + 0 * noise, style[1] + 0 * noise),
        "caption_match": (caption[0] + 0.3 * gain + noise, caption[1] + noise),
    }
    liking = gain + rng.normal(0, 0.01, (30, 2))
    return made(judged, {"liking": (liking, liking)})


def test_best_of_n_that_wins_is_said_to() -> None:
    found = arms(many((0.1, 0.9), (0.4, 0.35), better=True))
    best = by_name(found)["best of 2 by liking"]
    assert standing(best) == {"style": 0, "caption_match": 1}
    assert beats(best)
    assert not loses(best)
    said = verdict(found, ABOUT)
    assert "Where calls cost nothing, best-of-n wins: best of 2 by liking" in said
    assert "from 0.50 to 1.00" in said
    assert "At equal seconds there is no best-of-n to compare it with" in said


def test_best_of_n_that_does_not_is_said_not_to() -> None:
    found = arms(many((0.1, 0.9), (0.4, 0.4), better=False))
    best = by_name(found)["best of 2 by liking"]
    assert loses(best)
    said = verdict(found, ABOUT)
    assert "best-of-n never wins" in said
    assert "best of 2 by liking (style 0.00, caption 0.400; 4.20 s) loses" in said
    assert "caption match stays within its interval" in said


def test_a_loss_of_caption_match_is_said() -> None:
    found = arms(many((0.1, 0.9), (0.4, 0.3), better=False))
    assert re.search(r"caption match falls \(0\.40\d to 0\.30\d, difference −0\.100", verdict(found, ABOUT))
    assert "is better in one and worse in the other" in verdict(found, ABOUT)


def test_shapes_must_agree() -> None:
    with pytest.raises(DataError, match="prompts, seeds"):
        made({"style": ([[1.0, 0.0]], [[1.0, 0.0]])}, {"liking": ([[1.0]], [[1.0]])})
