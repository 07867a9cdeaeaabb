from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from flowalign.errors import DataError
from flowalign.evaluate.agreement import agreement, ranks, spearman


def test_ranks_are_those_of_scipy_in_every_group() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.integers(0, 6, 200).astype(float), rng.integers(0, 9, 200)
    found = ranks(values, groups)
    for group in range(9):
        assert found[groups == group] == pytest.approx(stats.rankdata(values[groups == group]))
    assert ranks([], np.array([], dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize("levels", [3, 1_000_000])
def test_spearman_is_that_of_scipy(levels: int) -> None:
    rng = np.random.default_rng(1)
    a, groups = rng.integers(0, levels, 300).astype(float), rng.integers(0, 12, 300)
    b = -a + levels * rng.standard_normal(300)
    expected = stats.spearmanr(a, b).statistic
    assert expected < -0.1
    assert spearman(a, b) == pytest.approx([expected])
    each = [stats.spearmanr(a[groups == group], b[groups == group]).statistic for group in range(12)]
    assert spearman(a, b, groups) == pytest.approx(each)


def test_order_alone_counts_and_its_sign() -> None:
    a = np.arange(7.0)
    assert spearman(a, np.exp(a)) == pytest.approx([1])
    assert spearman(a, -(a**3)) == pytest.approx([-1])
    assert math.isnan(spearman(a, np.ones(7))[0])
    assert math.isnan(spearman([1.0], [2.0])[0])


def test_rewards_can_agree_over_all_pictures_and_differ_within_every_prompt() -> None:
    prompt = np.repeat(np.arange(20), 4)
    inside = np.tile(np.arange(4.0), 20)
    scores = np.stack([100 * prompt + inside, 100 * prompt - inside], axis=1)
    found = agreement(scores, prompt)
    assert found.pooled[0, 1] == pytest.approx(stats.spearmanr(*scores.T).statistic)
    assert found.pooled[0, 1] > 0.95
    assert found.within[0, 1] == pytest.approx(-1)
    assert found.prompts[0, 1] == 20


def test_pictures_that_a_reward_did_not_score_are_left_out_of_its_pairs_only() -> None:
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((60, 3))
    scores[:20, 1] = np.nan
    prompts = [f"prompt {place % 10}" for place in range(60)]
    found = agreement(scores, prompts)
    assert found.pooled[0, 1] == pytest.approx(stats.spearmanr(scores[20:, 0], scores[20:, 1]).statistic)
    assert found.pooled[0, 2] == pytest.approx(stats.spearmanr(scores[:, 0], scores[:, 2]).statistic)
    assert np.array_equal(found.pooled, found.pooled.T)
    assert agreement(scores[:10], prompts[:10]).prompts.max() == 0  # one picture a prompt
    assert np.isnan(agreement(scores[:10], prompts[:10]).within).all()


@pytest.mark.parametrize(("a", "b"), [([1.0, 2.0], [1.0]), ([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.0], [math.inf, 2.0])])
def test_what_cannot_be_ranked_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(DataError, match="finite numbers, one length"):
        spearman(a, b)
