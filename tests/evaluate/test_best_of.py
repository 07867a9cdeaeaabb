"""Best of n: the weights are those of all subsets, counted."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from flowalign.errors import DataError
from flowalign.evaluate.best_of import best_of, best_of_weights


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_weights_are_the_share_of_subsets_that_each_wins(n: int) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 5))
    for row, weights in zip(scores, best_of_weights(scores, n), strict=True):
        wins = np.zeros(5)
        for subset in combinations(range(5), n):
            wins[max(subset, key=lambda place: row[place])] += 1
        assert weights == pytest.approx(wins / wins.sum())


def test_equal_scores_share() -> None:
    assert best_of_weights([[1.0, 2.0, 2.0, 0.0]], 2)[0] == pytest.approx([1 / 6, 2.5 / 6, 2.5 / 6, 0])
    assert best_of_weights([[3.0, 3.0, 3.0]], 3)[0] == pytest.approx([1 / 3] * 3)


def test_what_is_kept_is_judged() -> None:
    scores, judged = [[0.1, 0.9, 0.5]], [[10.0, 20.0, 60.0]]
    assert best_of(scores, judged, 1)[0] == pytest.approx(30)
    assert best_of(scores, judged, 3)[0] == pytest.approx(20)
    assert best_of(scores, judged, 2)[0] == pytest.approx((60 + 20 + 20) / 3)
    assert best_of(np.negative(scores), judged, 3)[0] == pytest.approx(10)


def test_its_mean_is_that_of_drawing_again() -> None:
    rng = np.random.default_rng(1)
    scores = rng.uniform(size=(4000, 8))
    assert best_of(scores, scores, 4).mean() == pytest.approx(4 / 5, abs=0.005)  # of uniform numbers: n / (n + 1)


@pytest.mark.parametrize(
    ("scores", "n", "part"),
    [
        ([[1.0, 2.0]], 3, "choose 1 to 2"),
        ([[1.0, 2.0]], 0, "best of 0"),
        ([1.0, 2.0], 1, "shape (2,)"),
        ([[1.0, np.nan]], 1, "finite"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(scores: list[float], n: int, part: str) -> None:
    with pytest.raises(DataError) as error:
        best_of_weights(scores, n)
    assert part in str(error.value)


def test_shapes_must_agree() -> None:
    with pytest.raises(DataError, match="one shape"):
        best_of([[1.0, 2.0]], [[1.0]], 1)
