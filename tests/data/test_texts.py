"""What a source says beside its pictures, read from whole columns: exactly what its rows say one by one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowalign.data.audit import audit
from flowalign.data.readers import Comparisons, open_comparisons, split_by_prompt
from flowalign.data.texts import read_texts
from flowalign.errors import DataError
from tests.data.test_pipeline import picture
from tests.data.test_reach import ROWS, rows_in, write


def same_texts(comparisons: Comparisons, seed: int = 3) -> None:
    texts = read_texts(comparisons, seed)
    assert texts is not None
    bad: dict[int, str] = {}
    for place in range(len(comparisons)):
        try:
            assert texts.ids[place] == comparisons[place].id
        except DataError as error:
            bad[place] = str(error)
    assert bad == texts.bad
    for fraction in (0.0, 0.3):
        ours, theirs = texts.split(fraction), split_by_prompt(comparisons, fraction, seed)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
            good = np.array([place for place in other if place not in bad], np.int64)
            assert texts.audit(good) == audit(comparisons, good)
            count = {"pictures": audit(comparisons, good)["pictures"], "prompts": audit(comparisons, good)["prompts"]}
            assert texts.count(good) == count


def test_texts_of_plain_tables_are_what_rows_say_one_by_one(tmp_path: Path) -> None:
    rows = rows_in(60)
    rows[7]["prompt"] = rows[31]["prompt"] = None
    rows[8]["prompt"] = " \u2003\n"
    more = {
        "caption": [f"caption {place % 5}" if place % 2 else None for place in range(60)],
        "preference": [None, 0.5, 0.25, 1.0, float("nan"), 1.5] * 10,
        "weight": [None, 1, 2, 3, -1, 0] * 10,
        "margin": [0.5] * 59 + [float("inf")],
        "generator": ["x", None] * 30,
        "seed": [1, None, -5] * 20,
        "unrelated": list(range(60)),
    }
    for name, source in {"plain": {}, "more": more}.items():
        (tmp_path / name).mkdir()
        path = write("parquet", rows, tmp_path / name, **source)
        for options in ({}, {"order": "reversed"}, {"limit": 41}, {"tie_policy": "drop"}):
            same_texts(open_comparisons(path, **options))
    dropped = open_comparisons(path, tie_policy="drop").index
    assert dropped is not None
    assert dropped.tolist() == [place for place in range(60) if place % 6 != 1]
    columns = {"title": "prompt", "good": "chosen", "poor": "rejected", "sure": "preference"}
    table = pq.read_table(path)
    table = table.rename_columns([{old: new for new, old in columns.items()}.get(name, name) for name in table.column_names])
    pq.write_table(table, tmp_path / "renamed.parquet")
    same_texts(open_comparisons(tmp_path / "renamed.parquet", columns={old: new for new, old in columns.items()}))


@pytest.mark.parametrize(
    "odd",
    [
        {"scores": [{"a": [2.0, 1.0]}] * 30, "num_chosen": [1, None, 2] * 10},
        {"objective_weights": [{"a": 0.5, "b": 0.5}, None, {"a": 1.0}] * 10},
        {"chosen_seed": [1, None] * 15, "rejected_seed": [2, None, 3] * 10},
        {"weight": ["1.5", "many", None] * 10},
        {"generator": [["a", "b"], None, ["a"]] * 10},
        {"grades": [[2.0, 1.0], [1.0, 2.0], None] * 10},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_texts_of_rows_with_more_in_them(tmp_path: Path, odd: dict[str, list[Any]]) -> None:
    same_texts(open_comparisons(write("parquet", rows_in(30), tmp_path, **odd)))


def test_texts_of_votes_with_names(tmp_path: Path) -> None:
    """Pick-a-Pic's form: pictures are told apart by names that recur, so that there are duplicates and contradictions."""
    rng = np.random.default_rng(0)
    count = 300
    labels = [[(1, 0), (0, 1), (0.5, 0.5), (0.7, 0.7), (None, 1)][each] for each in rng.integers(0, 5, count)]
    uids = [[f"u{a}" if a else None, f"u{b}"] for a, b in rng.integers(0, 4, (count, 2))]
    table = {
        "caption": [f"prompt {each}" for each in rng.integers(0, 4, count)],
        **{f"jpg_{side}": [b"picture"] * count for side in (0, 1)},
        **{f"label_{side}": [label[side] for label in labels] for side in (0, 1)},
        **{f"image_{side}_uid": [uid[side] for uid in uids] for side in (0, 1)},
        "has_label": [bool(each) for each in rng.integers(0, 8, count)],
    }
    pq.write_table(pa.table(table), tmp_path / "votes.parquet", row_group_size=70)
    comparisons = open_comparisons(tmp_path / "votes.parquet")
    counts = audit(comparisons)
    assert all(counts[name] for name in ("ties", "duplicates", "contradictions", "same_picture", "pictures_in_both_roles"))
    same_texts(comparisons)
    same_texts(open_comparisons(tmp_path / "votes.parquet", order="reversed"))
    for name in ("image_0_uid", "image_1_uid", "has_label"):
        del table[name]
    pq.write_table(pa.table(table), tmp_path / "plain.parquet")
    same_texts(open_comparisons(tmp_path / "plain.parquet"))


def test_texts_of_archives(tmp_path: Path) -> None:
    path = write("tar", rows_in(50), tmp_path)
    same_texts(open_comparisons(path))
    same_texts(open_comparisons(path, limit=13, order="reversed"))
    samples: list[dict[str, bytes]] = [
        {"txt": b" a cat ", "chosen.png": b"1", "rejected.jpg": b"2"},
        {"rejected.png": b"1", "txt": b"a dog\xff", "chosen.webp": b"2", "cls": b"9"},
        {"txt": b"", "chosen.png": b"1", "rejected.png": b"2"},
        {"txt": b"a cat", "chosen.png": b"1"},
        {"txt": b"a cat", "chosen.png": b"1", "rejected.png": b"2", "json": b'{"preference": 0.5}'},
        {"json": b'{"prompt": "a bird"}', "chosen.png": b"1", "rejected.png": b"2"},
        {"txt": b"a cat", "chosen.png": b"1", "rejected.png": b"2", "weight.txt": b"2.5"},
        {"txt": b"a cat", "chosen.png": b"1", "rejected.png": b"2", "mask.png": b"3"},
        {"caption.txt": b"a hat", "chosen.png": b"1", "rejected.png": b"2"},
        {"txt": b"a cat", "chosen.png": b"1", "chosen.jpg": b"2", "rejected.png": b"3"},
    ]
    for shard in range(2):
        with tarfile.open(tmp_path / f"odd-{shard}.tar", "w") as tar:
            for number, sample in enumerate(samples):
                for ending, data in sample.items():
                    info = tarfile.TarInfo(f"{shard}-{number}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (tmp_path / "votes.tar").unlink()
    same_texts(open_comparisons(tmp_path, format="webdataset"))


HELD_OUT = {
    (0.1, 0): [1, 13, 21, 34, 41, 53, 61, 74, 81, 93, 101, 114],
    (0.25, 5): [
        *(1, 5, 9, 12, 18, 22, 28, 29, 35, 37, 41, 45, 49, 52, 58, 62, 68, 69, 75, 77, 81, 85, 89, 92, 98, 102, 108, 109),
        *(115, 117),
    ],
}  # fmt: skip
"""By (fraction, seed). Written down before texts were read by columns: of another split, figures would not compare."""


@pytest.mark.parametrize(("fraction", "seed"), HELD_OUT)
def test_splits_stay_what_they_are(tmp_path: Path, fraction: float, seed: int) -> None:
    comparisons = open_comparisons(write("parquet", rows_in(), tmp_path))
    texts = read_texts(comparisons, seed)
    assert texts is not None
    for theirs, ours in zip(split_by_prompt(comparisons, fraction, seed, 7), texts.split(fraction, 7), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for train, held in (texts.split(fraction), split_by_prompt(comparisons, fraction, seed)):
        assert held.tolist() == HELD_OUT[fraction, seed]
        assert sorted([*train, *held]) == list(range(ROWS))


def test_no_texts_where_a_picture_lies_elsewhere_or_rows_differ(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    pq.write_table(pa.table({"prompt": ["a"] * 3, "chosen": ["a.png"] * 3, "rejected": ["a.png"] * 3}), tmp_path / "p.parquet")
    assert read_texts(open_comparisons(tmp_path / "p.parquet"), 0) is None
    lists = {"prompt": ["a"] * 2, "chosen": [[b"1"], [b"1", b"2"]], "rejected": [[b"1"], [b"1", b"2"]]}
    pq.write_table(pa.table(lists), tmp_path / "l.parquet")
    assert read_texts(open_comparisons(tmp_path / "l.parquet"), 0) is None
