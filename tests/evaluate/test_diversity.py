"""Diversity against distances by hand."""

from __future__ import annotations

import pytest
from sklearn.metrics.pairwise import cosine_distances

from flowalign.errors import DataError
from flowalign.evaluate.diversity import pairwise_distance


def test_a_group_has_the_mean_of_its_pairs() -> None:
    """Right angles are 1 apart, opposites 2, the same direction 0."""
    rows = [[1, 0], [0, 2], [-3, 0], [5, 5], [1, 1]]
    found = pairwise_distance(rows, ["a", "a", "a", "b", "b"])
    assert found == pytest.approx([(1 + 2 + 1) / 3, 0])
    assert found[0] == pytest.approx(cosine_distances(rows[:3]).sum() / 6)


def test_order_of_pictures_does_not_matter() -> None:
    rows = [[1, 0], [3, 1], [0, 2], [5, 5]]
    mixed = pairwise_distance([rows[place] for place in (0, 2, 1, 3)], ["a", "b", "a", "b"])
    assert mixed == pytest.approx(pairwise_distance(rows, ["a", "a", "b", "b"]))


@pytest.mark.parametrize(
    ("rows", "groups", "said"),
    [
        ([[1, 0], [0, 1]], ["a", "b"], "one picture of 'a'"),
        ([[1, 0]], ["a", "a"], r"shape \(1, 2\) for 2 pictures"),
        ([], [], "at least 1"),
    ],
)
def test_what_has_no_pairs_is_refused(rows: list[list[int]], groups: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        pairwise_distance(rows, groups)
