"""Weights of objectives: from a file to arrays in the order of the run, and what cannot be one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowalign.data.audit import audit
from flowalign.data.readers import open_comparisons
from flowalign.data.weights import are_even, grid, in_order, shares, wording
from flowalign.data.writer import row_of, write_comparisons
from flowalign.errors import ConfigError, DataError


def rows(folder: Path, *weights: object) -> Path:
    lines = [{"prompt": "a", "chosen": "x.png", "rejected": "y.png", "objective_weights": each} for each in weights]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def test_rows_name_their_objectives(tmp_path: Path) -> None:
    found = open_comparisons(rows(tmp_path, {"clip": 0.25, "style": 0.75}, None, {"clip": 1}))
    assert [each.objective_weights for each in found] == [{"clip": 0.25, "style": 0.75}, None, {"clip": 1.0}]
    write_comparisons(tmp_path / "again.jsonl", [row_of(each) for each in found])
    assert [each.objective_weights for each in open_comparisons(tmp_path / "again.jsonl")] == [
        each.objective_weights for each in found
    ]


def test_a_struct_of_parquet_may_lack_some(tmp_path: Path) -> None:
    weights = [{"clip": 0.25, "style": 0.75}, {"clip": 1.0, "style": None}]
    table = {"prompt": ["a", "b"], "chosen": ["x.png"] * 2, "rejected": ["y.png"] * 2, "objective_weights": weights}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    found = open_comparisons(tmp_path / "rows.parquet")
    assert [each.objective_weights for each in found] == [{"clip": 0.25, "style": 0.75}, {"clip": 1.0}]


@pytest.mark.parametrize(
    ("weights", "what"),
    [([0.2, 0.8], "does not fit"), ({"clip": "many"}, "must be a finite number"), ({"clip": 0.4}, "sum to 1")],
)
def test_rows_that_have_none_are_told_so(tmp_path: Path, weights: object, what: str) -> None:
    with pytest.raises(DataError, match=what):
        open_comparisons(rows(tmp_path, weights))[0]


def test_weights_come_in_the_order_of_the_run() -> None:
    assert in_order({"b": 0.25, "a": 0.75}, ("a", "b", "c")) == (0.75, 0.25, 0.0)
    assert in_order({"a": 0.3335, "b": 0.6665, "z": 0.0}, ("b", "a")) == pytest.approx((0.6665, 0.3335))
    assert sum(in_order({"a": 0.3333, "b": 0.6663}, ("b", "a"))) == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(DataError, match="objective_weights weighs 'stile', no objective of the run; did you mean 'style'"):
        in_order({"stile": 1.0}, ("clip", "style"))


def test_what_a_user_asks_for_is_in_any_scale() -> None:
    assert shares({"style": 3, "clip": 1}, ("clip", "style", "size")) == (0.25, 0.75, 0.0)
    with pytest.raises(ConfigError, match="the weight of clip is nan"):
        shares({"clip": float("nan")}, ("clip", "style"))


def test_words_have_one_digit() -> None:
    assert wording("a red heart", ("clip", "style"), (0.749, 0.251)) == "clip 0.7 style 0.3: a red heart"


def test_a_pair_that_is_voted_both_ways_under_other_weights_is_no_contradiction(tmp_path: Path) -> None:
    both = [
        {"prompt": "a", "chosen": a, "rejected": b, "objective_weights": {"x": x, "y": 1 - x}}
        for a, b, x in (("1.png", "2.png", 0.9), ("2.png", "1.png", 0.1), ("1.png", "2.png", 0.8), ("2.png", "1.png", 0.8))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    found = audit(open_comparisons(tmp_path / "rows.jsonl"))
    assert (found["contradictions"], found["duplicates"]) == (1, 0)


def test_a_grid_goes_from_corner_to_corner() -> None:
    assert grid(["a", "b"], 3) == [{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}]
    found = grid(["a", "b"], 7)
    assert [each["b"] for each in found] == pytest.approx([place / 6 for place in range(7)])
    assert [place for place, each in enumerate(found) if are_even(each)] == [3]
    three = grid(["a", "b", "c"], 7)
    assert three[:3] == [{name: float(name == corner) for name in "abc"} for corner in "abc"]
    assert three[3:] == [dict.fromkeys("abc", 1 / 3)]
    assert are_even({})
