from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from flowalign.errors import DataError
from flowalign.evaluate.compare import compare
from flowalign.evaluate.diversity import pairwise_distance, vendi_of_kernel, vendi_score
from flowalign.evaluate.hacking import (
    Series,
    divergence,
    grid_peak,
    hacking_signals,
    joint,
    joint_rates,
    less_diverse,
    means_by_prompt,
    paired_change,
)

PROMPTS = [f"prompt {place // 2}" for place in range(120)]


def drifting(slopes: Sequence[float], seed: int = 0, noise: float = 0.5) -> Series:
    """Scores of 120 pictures whose means at each checkpoint are `slopes`; a picture keeps its own level."""
    rng = np.random.default_rng(seed)
    level = rng.standard_normal(120)
    return Series(level + np.array(slopes)[:, None] + noise * rng.standard_normal((len(slopes), 120)), PROMPTS)


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_sounds() -> None:
    found = divergence(drifting([0, 0.5, 1, 1.5]), drifting([0, 0.6, 0.4, -0.2], seed=1), "style")
    assert found.alarm
    assert found.name == "divergence/style"
    assert "rises while style falls" in found.says
    changes = found.numbers["changes"]
    assert [change["since"] for change in changes] == [0, 1, 2]
    assert found.numbers["level"] == pytest.approx(1 - 0.05 / 3)


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ([0, 0.5, 1.0], [0, 0.4, 0.8]),  # both rise
        ([0, -0.5, -1.0], [0, 0.4, 0.8]),  # the signs of an alarm, swapped
        ([0, -0.5, -1.0], [0, -0.4, -0.8]),  # both fall: bad, and something else
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_other_courses_do_not(train: list[float], held: list[float]) -> None:
    found = divergence(drifting(train), drifting(held, seed=1))
    assert not found.alarm
    assert found.says.startswith("No divergence")


def test_a_fall_after_a_rise_sounds_though_the_end_lies_above_the_start() -> None:
    found = divergence(drifting([0, 1, 2]), drifting([0, 2, 1], seed=1))
    assert found.alarm
    assert "since checkpoint 1" in found.says


def test_changes_are_paired_means_with_the_comparisons_interval() -> None:
    train, held = drifting([0, 1]), drifting([0, -1], seed=1)
    (change,) = divergence(train, held).numbers["changes"]
    for series, told in ((train, change["train"]), (held, change["held_out"])):
        scores = np.asarray(series.scores)
        expected = compare(scores[0], scores[1], groups=PROMPTS, resamples=2000).mean_difference
        assert told == {
            "value": pytest.approx(expected.value),
            "low": pytest.approx(expected.low),
            "high": pytest.approx(expected.high),
        }


def test_without_a_change_it_rarely_sounds() -> None:
    alarms = sum(divergence(drifting([0] * 4, seed=seed), drifting([0] * 4, seed=100 + seed)).alarm for seed in range(12))
    assert alarms <= 1


def test_joint_rates_are_counted_by_hand() -> None:
    base = np.zeros((6, 2))
    aligned = np.array([[1, 1], [1, -1], [-1, -1], [0, 1], [3, 3], [-1, 1]])
    found = joint_rates(base, aligned, ["a", "b", "c", "d", "e", "e"])
    # a: better by both; b: divided; c: worse by both; d: equal by one; e: means 1 and 2, better by both
    assert (found.better.value, found.worse.value, found.difference.value) == (
        pytest.approx(2 / 5),
        pytest.approx(1 / 5),
        pytest.approx(1 / 5),
    )
    assert (found.rewards, found.prompts) == (2, 5)


def test_swapped_models_swap_the_joint_rates() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((120, 3))
    aligned = base + 0.8 + rng.standard_normal((120, 3))
    found, turned = joint_rates(base, aligned, PROMPTS), joint_rates(aligned, base, PROMPTS)
    assert found.better == turned.worse
    assert found.worse == turned.better
    assert found.difference.value == -turned.difference.value > 0
    assert (joint(base, aligned, PROMPTS).alarm, joint(aligned, base, PROMPTS).alarm) == (False, True)
    assert "JCR_3" in joint(aligned, base, PROMPTS).says


def test_more_rewards_agree_less_often() -> None:
    rng = np.random.default_rng(1)
    base, aligned = rng.standard_normal((2, 800, 3))
    prompts = list(range(800))
    for k in (1, 2, 3):
        found = joint_rates(base[:, :k], aligned[:, :k], prompts)
        assert found.better.value == pytest.approx(2.0**-k, abs=0.05)
        assert found.worse.value == pytest.approx(2.0**-k, abs=0.05)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_vendi_score_of_equal_pictures_is_one_and_of_orthogonal_ones_their_number(n: int) -> None:
    assert vendi_score(np.ones((n, 4)), ["p"] * n) == pytest.approx([1])
    assert vendi_score(3 * np.eye(n, 12), ["p"] * n) == pytest.approx([n])
    mixed = np.repeat(np.eye(3), n, axis=0)  # three kinds, n copies of each
    assert vendi_score(mixed, ["p"] * (3 * n)) == pytest.approx([3])


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9, -0.5])
def test_the_vendi_score_of_two_pictures_in_closed_form(cosine: float) -> None:
    share = np.array([(1 + cosine) / 2, (1 - cosine) / 2])  # eigenvalues of [[1, c], [c, 1]] / 2
    expected = np.exp(-(share * np.log(share)).sum())
    vectors = np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]])
    assert vendi_score(vectors, ["p", "p"]) == pytest.approx([expected])
    assert vendi_of_kernel([[1, cosine], [cosine, 1]]) == pytest.approx(expected)


def test_the_vendi_score_is_the_entropy_of_singular_values_and_does_not_see_the_order() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 6))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    share = np.linalg.svd(unit, compute_uv=False) ** 2 / 20
    expected = np.exp(-(share * np.log(share)).sum())
    order = rng.permutation(20)
    assert vendi_score(rows, ["p"] * 20) == pytest.approx([expected])
    assert vendi_score(rows[order], ["p"] * 20) == pytest.approx([expected])
    groups = ["a", "b"] * 10
    assert vendi_score(rows, groups) == pytest.approx([vendi_score(rows[at::2], ["p"] * 10)[0] for at in (0, 1)])


@pytest.mark.parametrize("kernel", [np.ones((2, 3)), [[2.0, 0], [0, 2]], [[1, 0.5], [0.1, 1]], np.zeros((0, 0))])
def test_what_is_no_similarity_is_refused(kernel: Any) -> None:
    with pytest.raises(DataError):
        vendi_of_kernel(kernel)
    with pytest.raises(DataError, match="one picture of 'p'"):
        vendi_score([[1.0, 2.0]], ["p"])


def test_collapsing_pictures_lower_both_measures_of_diversity_and_sound() -> None:
    rng = np.random.default_rng(0)
    prompts = [f"prompt {place // 8}" for place in range(240)]
    base = rng.standard_normal((240, 16))
    centre = np.repeat(rng.standard_normal((30, 16)), 8, axis=0)
    aligned = centre + 0.5 * rng.standard_normal((240, 16))
    names = sorted(set(prompts), key=prompts.index)
    for name, measure in (("distance", pairwise_distance), ("vendi", vendi_score)):
        before, after = measure(base, prompts), measure(aligned, prompts)
        found = less_diverse(name, before, after, names)
        assert found.alarm
        assert found.numbers["relative"] == pytest.approx(after.mean() / before.mean() - 1)
        assert not less_diverse(name, after, before, names).alarm
        assert not less_diverse(name, before, before, names).alarm


def test_a_grid_sounds_where_aligned_has_more_of_it() -> None:
    rng = np.random.default_rng(0)
    base, aligned = rng.random(120), rng.random(120) + 0.5
    assert grid_peak(base, PROMPTS, aligned, PROMPTS).alarm
    assert not grid_peak(aligned, PROMPTS, base, PROMPTS).alarm
    assert not grid_peak(base, PROMPTS, base[::-1], PROMPTS[::-1]).alarm


def test_prompts_are_paired_by_name_and_weigh_alike() -> None:
    found = paired_change([1.0, 3.0, 9.0], ["a", "a", "gone"], [5.0, 7.0, 8.0, 0.0], ["b", "a", "a", "c"])
    assert found.value == pytest.approx(7.5 - 2.0)
    with pytest.raises(DataError, match="share no prompt"):
        paired_change([1.0], ["a"], [2.0], ["b"])


def test_all_signals_at_once_and_only_those_that_can_be_read() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((120, 2))
    found = hacking_signals(
        train=drifting([0, 1]),
        held_out={"style": drifting([0, -1], seed=1), "caption": drifting([0, 1], seed=2)},
        rewards=(base, base - 1, PROMPTS),
        diversity={"vendi": ([3.0, 4.0, 5.0], [3.0, 4.0, 5.0], ["a", "b", "c"])},
        peaks=(rng.random(120), PROMPTS, rng.random(120) + 1, PROMPTS),
    )
    assert {signal.name: signal.alarm for signal in found} == {
        "divergence/style": True,
        "divergence/caption": False,
        "joint": True,
        "diversity/vendi": False,
        "grid_peak": True,
    }
    assert all(signal.says.endswith(".") for signal in found)
    assert hacking_signals() == ()
    with pytest.raises(DataError, match="give train as well"):
        hacking_signals(held_out={"style": drifting([0, 1])})


@pytest.mark.parametrize(
    "call",
    [
        lambda: divergence(drifting([0]), drifting([0])),
        lambda: divergence(drifting([0, 1]), drifting([0, 1, 2])),
        lambda: joint_rates([[1.0, 2.0]], [[1.0]], ["a"]),
        lambda: means_by_prompt([1.0, np.nan], ["a", "b"]),
        lambda: means_by_prompt([1.0], ["a", "b"]),
    ],
)
def test_scores_that_do_not_fit_are_refused(call: Any) -> None:
    with pytest.raises(DataError):
        call()
