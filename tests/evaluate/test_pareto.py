from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from flowalign.errors import DataError
from flowalign.evaluate.compare import mean_with_interval, of_means
from flowalign.evaluate.hacking import joint_rates
from flowalign.evaluate.pareto import (
    against,
    base_minimum,
    coverage,
    dispersion,
    hypervolume,
    hypervolume_of,
    mean_inner_product,
    min_reward_win_rate,
    multi_objective,
    steerability,
)

Array = NDArray[np.float64]
PROMPTS = [f"prompt {place // 2}" for place in range(80)]
ELEVEN = np.stack([np.linspace(0, 1, 11), np.linspace(1, 0, 11)], axis=1)


def by_inclusion_exclusion(points: Array, reference: Array) -> float:
    """Σ over subsets of (−1)^(size+1) times the volume of the subset's meet."""
    gaps = np.maximum(points - reference, 0)
    return float(
        sum(
            (-1) ** (size + 1) * gaps[list(subset)].min(0).prod()
            for size in range(1, len(gaps) + 1)
            for subset in itertools.combinations(range(len(gaps)), size)
        )
    )


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_hypervolume_is_what_inclusion_and_exclusion_give(objectives: int, count: int) -> None:
    rng = np.random.default_rng(objectives * 100 + count)
    for _ in range(5):
        points, reference = rng.normal(size=(count, objectives)), rng.normal(size=objectives) - 0.7
        assert hypervolume(points, reference) == pytest.approx(by_inclusion_exclusion(points, reference), abs=1e-12)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    points = np.abs(rng.normal(size=(30, objectives)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)  # on a sphere: all of them on the front
    drawn = rng.random((200_000, objectives))
    inside = np.zeros(len(drawn), dtype=bool)
    for point in points:
        inside |= (drawn <= point).all(1)
    share = inside.mean()
    assert hypervolume(points, np.zeros(objectives)) == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / len(drawn)))


def test_hypervolumes_in_closed_form() -> None:
    assert hypervolume([[3, 4, 5]], [1, 1, 1]) == 2 * 3 * 4
    assert hypervolume([[3, 1], [1, 3]], [0, 0]) == 3 + 3 - 1
    assert hypervolume([[2, 2, 1], [2, 1, 2], [1, 2, 2]], [0, 0, 0]) == 3 * 4 - 3 * 2 + 1
    stairs = [[step, 10 - step] for step in range(1, 10)]
    assert hypervolume(stairs, [0, 0]) == sum(range(1, 10))
    # copies, points that are dominated, points on or below the reference add nothing
    assert hypervolume([[3, 4], [3, 4], [2, 2], [0, 9], [-1, 20]], [0, 0]) == 12
    assert hypervolume(np.empty((0, 3)), [0, 0, 0]) == 0
    assert hypervolume([[-1, -1]], [0, 0]) == 0


def test_hypervolume_does_not_depend_on_order_and_scales_with_each_objective() -> None:
    rng = np.random.default_rng(3)
    points = rng.random((12, 4))
    value = hypervolume(points, np.zeros(4))
    assert hypervolume(points[rng.permutation(12)], np.zeros(4)) == pytest.approx(value, rel=1e-12)
    assert hypervolume(points[:, [2, 0, 3, 1]], np.zeros(4)) == pytest.approx(value, rel=1e-12)
    assert hypervolume(points * [1, 2, 3, 4] + 5, np.full(4, 5.0)) == pytest.approx(24 * value, rel=1e-12)
    assert hypervolume([*points, [1, 1, 1, 1]], np.zeros(4)) == pytest.approx(1)


def test_coverage_counts_what_is_matched_by_every_objective() -> None:
    a, b = [[1.0, 3.0], [3.0, 1.0]], [[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [0.0, 4.0]]
    assert coverage(a, b) == 0.5
    assert coverage(b, a) == 0.5
    assert coverage(a, a) == 1
    assert coverage([[9, 9]], b) == 1


def made(seed: int = 0, follow: float = 0.2, weights: Array = ELEVEN) -> Array:
    """Scores `[80, M, K]` in which each objective rises with its own weight, over rows with levels of their own."""
    rng = np.random.default_rng(seed)
    level = 0.1 * rng.normal(size=(80, 1, weights.shape[1]))
    return 0.5 + level + follow * (weights - weights.mean(0)) + 0.02 * rng.normal(size=(80, *weights.shape))


def test_mean_inner_product_is_the_mean_over_weights_and_pictures() -> None:
    scores = made()
    expected = np.mean([ELEVEN[m] @ scores[i, m] for m in range(11) for i in range(80)])
    found = mean_inner_product(scores, ELEVEN, PROMPTS)
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high
    # the same scores under weights in the wrong order follow them less
    assert mean_inner_product(scores, ELEVEN[::-1], PROMPTS).high < found.low


def test_dispersion_is_zero_for_a_policy_without_ears_and_has_a_closed_form() -> None:
    rng = np.random.default_rng(5)
    deaf = np.repeat(rng.normal(size=(80, 1, 2)), 11, axis=1)
    assert dispersion(deaf, PROMPTS).value == pytest.approx(0, abs=1e-12)
    heard = deaf + 0.3 * ELEVEN  # Var of eleven even steps in [0, 1] is 0.1, in both objectives
    assert dispersion(heard, PROMPTS).value == pytest.approx(0.3 * np.sqrt(0.2))
    pairs = [
        ((heard[:, a] - heard[:, b]) ** 2).sum(1) for a in range(11) for b in range(11)
    ]  # root mean square distance of two weights drawn at random, over √2
    assert dispersion(heard, PROMPTS).value == pytest.approx(np.sqrt(np.mean(pairs, axis=0)).mean() / np.sqrt(2))


def test_steerability_is_scipys_rank_correlation_of_the_means() -> None:
    rng = np.random.default_rng(6)
    weights = rng.dirichlet(np.ones(3), size=8).round(1)
    weights[:, 2] = 1 - weights[:, 0] - weights[:, 1]
    scores = made(1, 0.02, weights)
    found = steerability(scores, weights, PROMPTS)
    for k in range(3):
        assert found[k].value == pytest.approx(spearmanr(weights[:, k], scores[:, :, k].mean(0)).statistic)
        assert -1 <= found[k].low <= found[k].value <= found[k].high <= 1
    assert [each.value for each in steerability(made(), ELEVEN, PROMPTS)] == pytest.approx([1, 1])
    assert [each.value for each in steerability(made(), ELEVEN[::-1], PROMPTS)] == pytest.approx([-1, -1])


def test_the_weight_that_never_changes_steers_nothing() -> None:
    weights = np.full((4, 2), 0.5)
    assert all(
        np.isnan([each.value, each.low, each.high]).all() for each in steerability(made(weights=weights), weights, PROMPTS)
    )


def test_a_statistic_of_means_resamples_whole_prompts() -> None:
    rng = np.random.default_rng(7)
    level = np.repeat(rng.normal(size=8), 50)
    values, names = level + 0.01 * rng.normal(size=400), np.repeat(np.arange(8), 50)
    one = of_means(values[:, None], names.tolist(), lambda means: means)[0]
    assert one == mean_with_interval(values, names.tolist())
    # 400 rows of 8 prompts are 8 things that are known: the interval is as wide as that of the 8 means
    spread = level[::50].std() / np.sqrt(8)
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * spread, rel=0.2)
    square = of_means(values[:, None], names.tolist(), lambda means: means**2)[0]
    assert square.value == pytest.approx(values.mean() ** 2)


def test_the_interval_of_a_hypervolume_covers_the_true_one() -> None:
    truth = hypervolume(0.5 + 0.2 * (ELEVEN - 0.5), [0, 0])
    inside = 0
    for seed in range(40):
        found = hypervolume_of(made(seed), PROMPTS, [0, 0], resamples=200, seed=seed)
        inside += found.low <= truth <= found.high
    assert inside >= 30  # of 40, two pictures of a prompt being independent here; 95 % are 38


def test_two_fronts_on_the_same_prompts() -> None:
    first = made(2)
    found = against(first, first + 0.01, PROMPTS, [0, 0], resamples=300)
    gain = hypervolume(first.mean(0) + 0.01, [0, 0]) - hypervolume(first.mean(0), [0, 0])
    assert found.hypervolume.value == pytest.approx(gain)
    assert found.hypervolume.low > 0, "the same rows, so prompts that are easy for one are easy for the other"
    assert (found.coverage.value, found.covered.value) == (1, coverage(first.mean(0), first.mean(0) + 0.01))
    back = against(first + 0.01, first, PROMPTS, [0, 0], resamples=300)
    assert back.hypervolume.value == pytest.approx(-gain)
    assert back.coverage.value == found.covered.value


def test_min_reward_win_rate() -> None:
    base, aligned = np.array([[0.5, 0.4], [0.5, 0.5], [0.2, 0.9]]), np.array([[0.9, 0.3], [0.5, 0.7], [0.3, 0.4]])
    found = min_reward_win_rate(base, aligned, ["a", "b", "c"])
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)  # the worst: 0.3 < 0.4, 0.5 = 0.5, 0.3 > 0.2
    assert found.win_rate.value == 0.5


def test_all_at_once_agrees_with_each_and_can_be_written() -> None:
    scores, base = made(4), np.random.default_rng(4).random((80, 2))
    found = multi_objective(scores, ELEVEN, PROMPTS, base=base, resamples=200)
    assert found.reference == tuple(base.min(0)) == tuple(base_minimum(base))
    assert found.hypervolume == hypervolume_of(scores, PROMPTS, base.min(0), resamples=200)
    assert np.array([[each.value for each in point] for point in found.points]) == pytest.approx(scores.mean(0))
    assert found.steerability == tuple(steerability(scores, ELEVEN, PROMPTS, resamples=200))
    assert found.joint[3] == joint_rates(base, scores[:, 3], PROMPTS)
    assert len(found.joint) == len(found.min_reward) == 11
    assert found.points[0][0] == mean_with_interval(scores[:, 0, 0], PROMPTS, resamples=200)
    means = scores.mean(0)
    alive = [m for m in range(11) if not any((means[o] >= means[m]).all() and (means[o] > means[m]).any() for o in range(11))]
    assert list(found.front) == alive
    assert json.loads(json.dumps(asdict(found)))["hypervolume"]["value"] == found.hypervolume.value
    alone = multi_objective(scores, ELEVEN, PROMPTS, reference=[0, 0], resamples=50)
    assert (alone.joint, alone.min_reward, alone.reference) == ((), (), (0.0, 0.0))


@pytest.mark.parametrize(
    ("scores", "weights", "prompts", "says"),
    [
        (made()[:, 0], ELEVEN, PROMPTS, r"shape \(80, 2\) for 80 prompts"),
        (made(), ELEVEN, PROMPTS[1:], "for 79 prompts"),
        (np.full((80, 11, 2), np.nan), ELEVEN, PROMPTS, "give finite ones"),
        (made(), ELEVEN[1:], PROMPTS, r"weights have shape \(10, 2\)"),
        (made(), 2 * ELEVEN, PROMPTS, "summing to 1"),
        (made(), ELEVEN * [-1, 1] + [0, 1 - 0], PROMPTS, "not below 0"),
    ],
)
def test_what_does_not_fit_is_said(scores: Array, weights: Array, prompts: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        multi_objective(scores, weights, prompts, reference=[0, 0])


def test_a_reference_point_is_needed_and_must_fit() -> None:
    with pytest.raises(DataError, match="give the base's scores or a reference point"):
        multi_objective(made(), ELEVEN, PROMPTS)
    with pytest.raises(DataError, match=r"reference point \(3,\)"):
        hypervolume_of(made(), PROMPTS, [0, 0, 0])
    with pytest.raises(DataError, match="NaN or infinite"):
        hypervolume([[1, np.nan]], [0, 0])
    with pytest.raises(DataError, match="2 and 3 objectives"):
        against(made(), made(weights=np.eye(3)), PROMPTS, [0, 0])
