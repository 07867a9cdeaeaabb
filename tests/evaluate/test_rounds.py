"""Rounds against the base: win rates written out again, signs that sound and signs that do not, the round that is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flowalign.evaluate.rounds import Measured, best_of, calibrated, combined, reach, signs, told

PROMPTS = tuple(f"prompt {number // 3}" for number in range(90))
WEIGHTS = {"reward": 1.0}


def measured(reward: float = 0.0, judge: float = 0.0, wide: float = 1.0, seed: int = 0) -> Measured:
    """90 pictures of 30 prompts, with scores moved by so much and features so far apart."""
    rng = np.random.default_rng(seed)
    shift = 0.05 * rng.normal(size=(2, 90))
    own = np.random.default_rng(99).normal(size=(2, 90))
    scores = {"reward": own[0] + reward + shift[0], "judge": own[1] + judge + shift[1]}
    middle = np.repeat(np.random.default_rng(7).normal(size=(30, 8)), 3, axis=0)
    return Measured(PROMPTS, scores, middle + wide * np.random.default_rng(8).normal(size=(90, 8)))


def test_win_rates_are_capos() -> None:
    base, now = measured(), measured(0.7, seed=1)
    theirs = base.scores["reward"].reshape(30, 3)
    tau = np.sqrt(np.mean(2 * theirs.var(axis=1, ddof=1)))
    expected = [
        np.mean([1 / (1 + np.exp(-(score - other) / tau)) for other in theirs[place // 3]])
        for place, score in enumerate(now.scores["reward"])
    ]
    np.testing.assert_allclose(calibrated(base, now, "reward"), expected, rtol=1e-12)
    both = combined(base, now, {"reward": 3.0, "judge": -1.0})
    other = calibrated(base, now, "judge")
    np.testing.assert_allclose(both, (3 * np.array(expected) - other) / 4, rtol=1e-12)


def test_a_round_is_told_against_the_base() -> None:
    base = measured()
    found = told(base, measured(2.0, -2.0, seed=1), WEIGHTS)
    reward, judge = found["measures"]["reward"], found["measures"]["judge"]
    assert (reward["trained"], judge["trained"]) == (True, False)
    assert reward["calibrated"]["low"] > 0.5 > judge["calibrated"]["high"]
    assert reward["win_rate"]["value"] == 1.0
    assert judge["win_rate"]["value"] == 0.0
    assert reward["difference"]["value"] == pytest.approx(2.0, abs=0.05)
    assert found["combined"] == reward["calibrated"]
    assert (found["pictures"], found["prompts"]) == (90, 30)
    still = told(base, base, WEIGHTS)
    assert still["measures"]["reward"]["win_rate"]["value"] == 0.5


def test_how_far_rewards_reach_together() -> None:
    base, now = measured(), measured(1.0, 0.5, seed=1)
    assert reach(base, now, WEIGHTS) is None  # there is nothing to reach together
    assert told(base, now, WEIGHTS)["reach"] is None
    found = reach(base, now, {"reward": 1.0, "judge": -2.0, "other": 0.0})
    assert found is not None
    theirs = [calibrated(base, base, "reward"), 1 - calibrated(base, base, "judge")]  # less of it is asked for
    ours = [calibrated(base, now, "reward"), 1 - calibrated(base, now, "judge")]
    assert (found["objectives"], found["under"]) == (["reward", "judge"], [])
    assert found["reference"] == pytest.approx([each.min() for each in theirs])
    assert [one["value"] for one in found["points"][0]] == pytest.approx([each.mean() for each in ours])
    sides = [mine.mean() - their.min() for mine, their in zip(ours, theirs, strict=True)]
    volume = found["hypervolume"]
    assert volume["value"] == pytest.approx(sides[0] * sides[1])
    assert volume["low"] < volume["value"] < volume["high"]
    assert "steerability" not in found


def test_a_front_is_of_all_weights_and_steering_is_its_order() -> None:
    base, even = measured(), measured(0.5, 0.5, seed=1)
    under = ({"reward": 1.0, "judge": 0.0}, {"reward": 0.5, "judge": 0.5}, {"reward": 0.0, "judge": 1.0})
    moved = np.array([1.0, 0.5, 0.0])
    front = {"reward": base.scores["reward"][:, None] + moved, "judge": base.scores["judge"][:, None] + moved[::-1]}
    both = {"reward": 1.0, "judge": 1.0}

    def found(front: dict[str, Any]) -> dict[str, Any]:
        return reach(base, replace(even, under=under, front=front), both) or {}

    right = found(front)
    assert {name: each["value"] for name, each in right["steerability"].items()} == {"reward": 1.0, "judge": 1.0}
    turned = found({"reward": front["judge"], "judge": front["reward"]})
    assert {name: each["value"] for name, each in turned["steerability"].items()} == {"reward": -1.0, "judge": -1.0}
    still = found({name: np.repeat(each[:, 1:2], 3, axis=1) for name, each in front.items()})
    assert still["steerability"] == {"reward": None, "judge": None}
    assert still["hypervolume"]["value"] < right["hypervolume"]["value"]
    alone = reach(base, replace(even, scores={name: each[:, 1] for name, each in front.items()}), both)
    assert alone is not None
    assert still["hypervolume"] == pytest.approx(alone["hypervolume"])


def alarms(*history: Measured, drop: float = 0.5) -> set[str]:
    return {sign.name for sign in signs(history, WEIGHTS, drop=drop) if sign.alarm}


def test_what_is_hacking_sounds_and_what_is_not_does_not() -> None:
    base = measured()
    assert alarms(base, measured(1.0, seed=1)) == set()
    assert alarms(base, measured(1.0, 1.0, seed=1)) == set()
    assert alarms(base, measured(1.0, -1.0, seed=1)) == {"divergence/judge"}
    assert alarms(base, measured(1.0, 1.0, seed=1), measured(1.5, 0.5, seed=2)) == {"divergence/judge"}  # since round 1
    assert alarms(base, measured(-1.0, -1.0, seed=1)) == {"joint"}


def test_diversity_may_fall_as_far_as_it_may() -> None:
    base, alike = measured(), measured(1.0, wide=0.2, seed=1)
    assert alarms(base, alike) == {"diversity/pictures of a prompt"}
    assert alarms(base, alike, drop=0.99) == set()
    (says,) = (sign.says for sign in signs([base, alike], WEIGHTS, drop=0.99) if sign.name.startswith("diversity"))
    assert says.startswith("Diversity is within its limit of −99 %")


def test_a_speck_in_a_white_corner_is_not_diversity() -> None:
    base = measured()
    white = Measured(PROMPTS, base.scores, np.concatenate([base.features, np.ones((90, 1))], axis=1))
    speck = white.features.copy()
    speck[::3, -1] -= 1 / 255
    now = Measured(PROMPTS, base.scores, speck)
    before, after = (told(white, each, WEIGHTS)["diversity"]["value"] for each in (white, now))
    assert after == pytest.approx(before, rel=0.01)


def rounds(*values: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {
            "combined": {"value": one},
            "measures": {"judge": {"calibrated": {"value": two}}},
            "reach": {"hypervolume": {"value": one * two}},
        }
        for one, two in values
    ]


def test_the_best_round_is_the_highest_by_what_was_asked_for() -> None:
    found = rounds((0.6, 0.4), (0.8, 0.5), (0.7, 0.6), (0.8, 0.2))
    assert best_of(found, "combined") == 1
    assert best_of(found, "judge") == 2
    assert best_of(found, "hypervolume") == 2
    assert best_of(found[:2], "hypervolume") == 1
    assert best_of([], "combined") is None
