from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from flowalign.data.records import Comparison, FileImage, InlineImage, SpanImage, key63
from flowalign.errors import DataError
from flowalign.rng import key

A, B, C = (InlineImage(name, name.encode()) for name in "abc")


def test_a_pair_needs_no_more_than_prompt_and_pictures() -> None:
    pair = Comparison("a cat", (A, B))
    assert (pair.num_chosen, pair.weight, pair.preference, pair.is_tie) == (1, 1.0, 1.0, False)
    assert pair.images[0].read() == b"a"
    assert 0 <= pair.id < 2**63


def test_the_id_depends_on_prompt_and_order_and_on_nothing_else() -> None:
    pair = Comparison("a cat", (A, B))
    assert pair.id == Comparison("a cat", (A, B), weight=3.0, preference=0.5, source="x:1").id
    assert len({pair.id, Comparison("a dog", (A, B)).id, Comparison("a cat", (B, A)).id, Comparison("a cat", (A, C)).id}) == 4


def test_the_opposite_taste_has_the_worst_picture_first() -> None:
    group = Comparison(
        "a cat",
        (A, B, C),
        num_chosen=2,
        scores={"style": (3.0, 2.0, 0.5)},
        margin=0.25,
        preference=0.9,
        grades=(4.0, 3.0, 1.0),
        generator=("x", "y", "z"),
        seed=(1, 2, 3),
        annotator="ann",
        source="votes:1",
    )
    found = group.reversed()
    assert (found.images, found.num_chosen, found.seed, found.generator) == ((C, B, A), 1, (3, 2, 1), ("z", "y", "x"))
    assert found.scores == {"style": (-0.5, -2.0, -3.0)}
    assert found.grades == (4.0, 2.0, 1.0), "the gaps between neighbours, the other way round"
    assert (found.preference, found.margin, found.annotator, found.source) == (0.9, 0.25, "ann", "votes:1")
    assert found.reversed() == group
    assert found.id == Comparison("a cat", (C, B, A), num_chosen=1).id != group.id
    alone = Comparison("a cat", (A,), preference=0.75).reversed()
    assert (alone.images, alone.num_chosen, alone.preference) == ((A,), 1, 0.25)


def test_the_same_pictures_under_other_weights_are_another_comparison() -> None:
    weighed = [Comparison("a cat", (A, B), objective_weights={"x": x, "y": 1 - x}) for x in (0.2, 0.3)]
    same = Comparison("a cat", (A, B), objective_weights={"y": 0.8, "x": 0.2})
    assert weighed[0].id == same.id
    assert len({weighed[0].id, weighed[1].id, Comparison("a cat", (A, B)).id}) == 3


def test_the_id_is_pinned() -> None:
    """A change would give every comparison of a resumed run other noise."""
    assert key63("a cat", "a", "b") == Comparison("a cat", (A, B)).id == 2842789130477721158


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  \n"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"images": ()}, "at least one picture"),
        ({"images": (A,), "num_chosen": 2}, "num_chosen is 2; with 1 pictures it must be 1 to 1"),
        ({"num_chosen": 2}, "num_chosen is 2"),
        ({"num_chosen": 0}, "num_chosen is 0"),
        ({"weight": -1.0}, "weight is -1"),
        ({"weight": math.nan}, "weight is nan"),
        ({"preference": 1.2}, "preference is 1.2"),
        ({"preference": math.nan}, "preference is nan"),
        ({"margin": math.inf}, "margin is inf"),
        ({"scores": {"r": (1.0,)}}, r"scores\['r'\] has 1 entries for 2"),
        ({"scores": {"r": (1.0, math.nan)}}, "finite"),
        ({"seed": (1, 2, 3)}, "seed has 3 entries"),
        ({"grades": (0.0, 1.0)}, "best first"),
        ({"objective_weights": {}}, "objective_weights are {}; they must be numbers that are not negative and sum to 1"),
        ({"objective_weights": {"a": 0.7, "b": 0.2}}, "objective_weights are"),
        ({"objective_weights": {"a": 1.2, "b": -0.2}}, "objective_weights are"),
        ({"objective_weights": {"a": math.nan, "b": 1.0}}, "objective_weights are"),
    ],
)
def test_values_that_mean_nothing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Comparison(**{"prompt": "a cat", "images": (A, B)} | fields)


def test_missing_file_and_cut_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        FileImage("x.png", tmp_path / "x.png").read()
    (tmp_path / "a.tar").write_bytes(b"12345")
    assert SpanImage("a", tmp_path / "a.tar", 1, 3).read() == b"234"
    with pytest.raises(DataError, match="ends in the middle"):
        SpanImage("a", tmp_path / "a.tar", 3, 3).read()


def test_rng_keys_are_not_comparison_ids() -> None:
    """Two hashes with two purposes: rng.key tells types apart, key63 takes names."""
    assert key("a") != key63("a")
