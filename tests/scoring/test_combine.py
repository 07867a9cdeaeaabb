"""One score for several: each way is its formula, and missing scores stay missing."""

from __future__ import annotations

import numpy as np
import pytest

from flowalign.errors import DataError
from flowalign.scoring.combine import WAYS, combined, disagreement

CALIBRATED = np.array([[0.9, 0.2, 0.5], [0.1, 0.6, 0.4], [0.5, 0.7, 0.6], [0.3, 0.3, 0.3], [0.8, np.nan, 0.1]])
GROUPS = [np.array([0, 1, 2, 4]), np.array([3])]
REWARDS = ("a", "b", "c")


def test_mean_sum_and_min_are_the_formulas() -> None:
    rows = CALIBRATED[:4].tolist()
    assert combined("mean", CALIBRATED, GROUPS)[:4] == pytest.approx([sum(row) / 3 for row in rows])
    assert combined("min", CALIBRATED, GROUPS)[:4] == pytest.approx([min(row) for row in rows])
    assert combined("sum", CALIBRATED, GROUPS)[:4] == pytest.approx([sum(row) for row in rows])
    weighted = combined("sum", CALIBRATED, GROUPS, rewards=REWARDS, weights={"c": 2.0, "a": 0.5})
    assert weighted[:4] == pytest.approx([0.5 * a + 2 * c for a, _, c in rows])


def test_a_majority_wins_by_votes_and_not_by_how_much() -> None:
    """Of rows 0, 1 and 2: two of three rewards put 0 before 1, 2 before 0, and all put 2 before 1."""
    found = combined("majority", CALIBRATED, GROUPS)
    assert found[[0, 1, 2]].tolist() == [0.5, 0.0, 1.0]
    assert np.isnan(found[[3, 4]]).all()  # alone in its prompt; a reward gave none
    huge = CALIBRATED * [1e6, 1.0, 1.0]
    assert combined("majority", huge, GROUPS)[[0, 1, 2]].tolist() == [0.5, 0.0, 1.0]


def test_a_draw_of_votes_is_half_a_win() -> None:
    scores = np.array([[0.9, 0.1], [0.1, 0.9], [0.0, 0.0]])
    assert combined("majority", scores, [np.arange(3)]).tolist() == [0.75, 0.75, 0.0]


@pytest.mark.parametrize("by", [way for way in WAYS if way not in ("fused", "general")])
def test_missing_scores_stay_missing(by: str) -> None:
    assert np.isnan(combined(by, CALIBRATED, GROUPS)[4])


def test_fitted_rates_are_passed_on() -> None:
    rates = np.array([0.1, 0.2, 0.3, np.nan, 0.5])
    assert combined("fused", CALIBRATED, GROUPS, fused=rates) is rates
    assert combined("general", CALIBRATED, GROUPS, general=rates) is rates
    with pytest.raises(DataError, match="nothing was fused"):
        combined("fused", CALIBRATED, GROUPS)
    with pytest.raises(DataError, match="no such model was fitted"):
        combined("general", CALIBRATED, GROUPS)


def test_other_ways_and_weights_are_refused() -> None:
    with pytest.raises(DataError, match="combined by 'product'; allowed: fused, general, majority, mean, min, sum"):
        combined("product", CALIBRATED, GROUPS)
    with pytest.raises(DataError, match="a weight is given for 'd'"):
        combined("sum", CALIBRATED, GROUPS, rewards=REWARDS, weights={"d": 1.0})
    with pytest.raises(DataError, match="use sum"):
        combined("mean", CALIBRATED, GROUPS, rewards=REWARDS, weights={"a": 1.0})


def test_disagreement_is_0_where_all_say_the_same_and_half_at_most() -> None:
    assert disagreement(np.array([[0.3, 0.3, 0.3]])).tolist() == pytest.approx([0.0])
    assert disagreement(np.array([[0.0, 1.0]])).tolist() == [0.5]
    rows = np.random.default_rng(0).random((500, 4))
    found = disagreement(rows)
    assert found.max() <= 0.5
    assert found[7] == pytest.approx(np.sqrt(((rows[7] - rows[7].mean()) ** 2).mean()))
    assert np.isnan(disagreement(CALIBRATED)[4])
