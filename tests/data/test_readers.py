from __future__ import annotations

import io
import json
import shutil
import tarfile
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flowalign import cli
from flowalign.data.readers import Comparisons, open_comparisons, scan, split_by_prompt, write_bad_rows
from flowalign.data.rows import _members
from flowalign.errors import DataError


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4), shade).save(out, "PNG")
    return out.getvalue()


def shades(comparisons: Comparisons, place: int) -> list[int]:
    """The grey level of each picture: which one came first."""
    return [int(Image.open(io.BytesIO(image.read())).getpixel((0, 0))) for image in comparisons[place].images]  # type: ignore[arg-type]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for shade in (10, 20, 30):
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    return tmp_path


PICK = {"caption": "a cat", "jpg_0": "10.png", "jpg_1": "20.png", "model_0": "m0", "model_1": "m1"}


@pytest.mark.parametrize(
    ("row", "order", "expected"),
    [
        (PICK | {"label_0": 1.0, "label_1": 0.0}, [10, 20], {"preference": 1.0, "generator": ("m0", "m1")}),
        (PICK | {"label_0": 0.0, "label_1": 1.0}, [20, 10], {"preference": 1.0, "generator": ("m1", "m0")}),
        (PICK | {"label_0": 0.5, "label_1": 0.5}, [10, 20], {"preference": 0.5, "is_tie": True}),
        ({"prompt": "a cat", "path1": "20.png", "path2": "10.png", "choice_dist": [9, 3]}, [20, 10], {"preference": 0.75}),
        ({"prompt": "a cat", "path1": "20.png", "path2": "10.png", "confidence": 0.9}, [20, 10], {"preference": 0.9}),
        ({"prompt": "a cat", "file_path": ["10.png", "20.png"], "human_preference": [0, 1]}, [20, 10], {"preference": 1.0}),
        (
            {"prompt": "a cat", "image_path": ["10.png", "20.png", "30.png"], "rank": [2, 3, 1]},
            [30, 10, 20],
            {"grades": (2.0, 1.0, 0.0)},
        ),
        ({"prompt": "a cat", "chosen": "20.png", "rejected": "10.png"}, [20, 10], {"num_chosen": 1, "weight": 1.0}),
        ({"prompt": "a cat", "img_path_win": "20.png", "img_path_lose": "10.png"}, [20, 10], {}),
        (
            {"prompt": "a cat", "chosen": ["10.png", "20.png"], "rejected": ["30.png", "10.png"], "weight": 2, "seed": 7},
            [10, 20, 30, 10],
            {"num_chosen": 2, "weight": 2.0, "seed": (7, 7, 7, 7)},
        ),
        (
            {"prompt": "a cat", "images": ["30.png", "10.png"], "scores": {"r": [0.7, 0.1]}, "preference": 0.8},
            [30, 10],
            {"scores": {"r": (0.7, 0.1)}, "preference": 0.8},
        ),
    ],
)
def test_conventions(pictures: Path, row: dict[str, Any], order: list[int], expected: dict[str, Any]) -> None:
    comparisons = open_comparisons(write_jsonl(pictures / "votes.jsonl", [row]))
    assert comparisons[0].prompt == "a cat"
    assert shades(comparisons, 0) == order
    assert {name: getattr(comparisons[0], name) for name in expected} == expected


def test_image_reward_rows_become_all_pairs_of_different_rank(pictures: Path) -> None:
    rows = [
        {"image": "10.png", "prompt_id": "p", "prompt": "a cat", "rank": 2},
        {"image": "20.png", "prompt_id": "q", "prompt": "a dog", "rank": 1},
        {"image": "20.png", "prompt_id": "p", "prompt": "a cat", "rank": 1},
        {"image": "30.png", "prompt_id": "p", "prompt": "a cat", "rank": 2},
        {"image": "30.png", "prompt_id": "q", "prompt": "a dog", "rank": None},
    ]
    comparisons = open_comparisons(write_jsonl(pictures / "ranks.jsonl", rows))
    good, bad = scan(comparisons)
    assert sorted(shades(comparisons, place) for place in good) == [[20, 10], [20, 30]]
    assert len(bad) == 1
    assert "ranks.jsonl:5" in bad[0].reason
    assert "rank" in bad[0].reason


BAD = [
    (PICK | {"label_0": 1.0, "label_1": 1.0}, "labels are 1 and 1"),
    (PICK | {"label_0": 0.0, "label_1": 0.0}, "labels are 0 and 0"),
    (PICK | {"label_0": None, "label_1": 1.0}, "'label_0' is missing or null"),
    (PICK | {"label_0": "yes", "label_1": 1.0}, "label_0 is 'yes'"),
    (PICK | {"label_0": 2.0, "label_1": -1.0}, "labels are 2 and -1"),
    (PICK | {"label_0": 1.0, "label_1": 0.0, "has_label": False}, "has no label"),
    (PICK | {"label_0": 1.0, "label_1": 0.0, "caption": " "}, "prompt"),
    (PICK | {"label_0": 1.0, "label_1": 0.0, "caption": None}, "prompt is missing"),
    (PICK | {"label_0": 1.0, "label_1": 0.0, "jpg_1": 5}, "a picture is 5"),
    ('{"caption": "cut', "not valid JSON"),
    ("[1, 2]", "must be a JSON object"),
]


def test_bad_rows_are_named_and_the_good_ones_kept(pictures: Path) -> None:
    good = PICK | {"label_0": 1.0, "label_1": 0.0}
    path = write_jsonl(pictures / "votes.jsonl", [good, *(row for row, _ in BAD), "", good])
    comparisons = open_comparisons(path)
    places, bad = scan(comparisons)
    assert places == [0, len(BAD) + 1]
    assert comparisons[len(BAD) + 1].source == f"votes.jsonl:{len(BAD) + 3}"  # the blank line counts as a line
    for row, (_, message) in zip(bad, BAD, strict=True):
        assert f"votes.jsonl:{row.row + 1}: " in row.reason
        assert message in row.reason
    with pytest.raises(DataError, match=r"votes.jsonl:2: labels are 1 and 1"):
        scan(comparisons, "error")
    write_bad_rows(pictures / "out" / "bad.jsonl", bad)
    lines = [json.loads(line) for line in (pictures / "out" / "bad.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, len(BAD) + 1))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "file_path": ["10.png", "20.png"], "human_preference": [1, 1]},
        {"prompt": "a", "file_path": ["10.png", "20.png"], "human_preference": [0, 0]},
        {"prompt": "a", "file_path": ["10.png", "20.png"], "human_preference": 1},
        {"prompt": "a", "file_path": ["10.png", "20.png"], "human_preference": [1]},
        {"prompt": "a", "path1": "10.png", "path2": "20.png", "choice_dist": [0, 0]},
        {"prompt": "a", "path1": "10.png", "path2": "20.png", "choice_dist": "9-3"},
        {"prompt": "a", "image_path": ["10.png", "20.png"], "rank": [1, 1]},
        {"prompt": "a", "chosen": "10.png", "rejected": "20.png", "scores": [1, 2]},
        {"prompt": "a", "chosen": "10.png", "rejected": None},
        {"prompt": ["a"], "chosen": "10.png", "rejected": "20.png"},
    ],
)
def test_votes_that_mean_nothing(tmp_path: Path, row: dict[str, Any]) -> None:
    comparisons = open_comparisons(write_jsonl(tmp_path / "votes.jsonl", [row]))
    with pytest.raises(DataError, match=r"^votes.jsonl:1: "):
        comparisons[0]


def test_ties_are_kept_as_soft_labels_or_dropped(pictures: Path) -> None:
    votes = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (9.0, 9.0), (0.5, 0.5)]
    path = write_jsonl(pictures / "votes.jsonl", [PICK | {"label_0": a, "label_1": b} for a, b in votes])
    soft = open_comparisons(path)
    assert [soft[place].preference for place in (0, 1, 2, 4)] == [1.0, 0.5, 1.0, 0.5]
    dropped = open_comparisons(path, tie_policy="drop")
    assert len(dropped) == 3  # the bad row stays to be reported
    assert scan(dropped)[0] == [0, 1]
    assert dropped[1].source == "votes.jsonl:3"
    assert len(open_comparisons(path, tie_policy="drop", limit=2)) == 2


def test_an_order_can_be_reversed(pictures: Path) -> None:
    votes = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    path = write_jsonl(pictures / "votes.jsonl", [PICK | {"label_0": a, "label_1": b} for a, b in votes])
    given, other = open_comparisons(path), open_comparisons(path, order="reversed")
    assert [each.images for each in other] == [each.images[::-1] for each in given]
    assert [each.images for each in other.select([1])] == [given[1].images[::-1]]
    assert len(open_comparisons(path, order="reversed", tie_policy="drop")) == 2


def test_columns_can_be_named(pictures: Path) -> None:
    row = {"text": "a cat", "good": "20.png", "poor": "10.png"}
    path = write_jsonl(pictures / "votes.jsonl", [row])
    comparisons = open_comparisons(path, columns={"prompt": "text", "chosen": "good", "rejected": "poor"})
    assert (comparisons[0].prompt, shades(comparisons, 0)) == ("a cat", [20, 10])
    with pytest.raises(DataError, match=r"has columns text, good, poor.*pick_a_pic.*chosen"):
        open_comparisons(path)
    with pytest.raises(DataError, match="did you mean 'chosen'"):
        open_comparisons(path, columns={"choosen": "good"})
    with pytest.raises(DataError, match=r"no column 'god'.*did you mean 'good'"):
        open_comparisons(path, columns={"chosen": "god"})


def test_named_columns_win_over_a_convention_that_also_fits(pictures: Path) -> None:
    row = PICK | {"label_0": 1.0, "label_1": 0.0, "better": "30.png", "worse": "10.png"}
    comparisons = open_comparisons(
        write_jsonl(pictures / "votes.jsonl", [row]), columns={"chosen": "better", "rejected": "worse"}
    )
    assert shades(comparisons, 0) == [30, 10]


def test_folder_with_metadata(pictures: Path) -> None:
    write_jsonl(pictures / "metadata.jsonl", [{"prompt": "a", "chosen_file_name": "30.png", "rejected_file_name": "10.png"}])
    comparisons = open_comparisons(pictures)
    assert shades(comparisons, 0) == [30, 10]


def test_pictures_may_lie_elsewhere(pictures: Path) -> None:
    path = write_jsonl(pictures / "labels" / "train.jsonl", [{"prompt": "a", "chosen": "30.png", "rejected": "10.png"}])
    assert shades(open_comparisons(path, image_folder=pictures), 0) == [30, 10]
    with pytest.raises(DataError, match="No such file"):
        open_comparisons(path)[0].images[0].read()


def test_json_array(pictures: Path) -> None:
    rows = [{"prompt": f"Käse „{i}“ ]}},{{[", "path1": "20.png", "path2": "10.png"} for i in range(3)]
    path = pictures / "train.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
        comparisons = open_comparisons(path)
        assert [each.prompt for each in comparisons] == [row["prompt"] for row in rows]
    path.write_text(json.dumps(rows)[:-5])
    with pytest.raises(DataError, match="not a JSON array"):
        open_comparisons(path)


def pick_table(count: int, start: int = 0) -> pa.Table:
    return pa.table(
        {
            "caption": [f"prompt {start + i}" for i in range(count)],
            "jpg_0": [png(10)] * count,
            "jpg_1": [png(20)] * count,
            "label_0": [float(i % 2 == 0) for i in range(count)],
            "label_1": [float(i % 2) for i in range(count)],
        }
    )


def test_parquet_shards_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pick_table(5), tmp_path / "data" / "train-00000-of-00002.parquet", row_group_size=2)
    pq.write_table(pick_table(4, 5), tmp_path / "data" / "train-00001-of-00002.parquet", row_group_size=3)
    pq.write_table(pick_table(1, 90), tmp_path / "data" / "validation-00000-of-00001.parquet")
    comparisons = open_comparisons(tmp_path)
    assert [each.prompt for each in comparisons] == [f"prompt {i}" for i in range(9)]
    assert shades(comparisons, 4) == [10, 20]
    assert shades(comparisons, 6) == [20, 10]
    assert comparisons[8].source == "train-00001-of-00002.parquet:3"
    assert open_comparisons(tmp_path, split="validation")[0].prompt == "prompt 90"
    with pytest.raises(DataError, match="no shards of split 'test'; allowed: train, validation"):
        open_comparisons(tmp_path, split="test")


@pytest.mark.parametrize(
    ("drop", "message"),
    [([], "also has weight, unlike 0.parquet"), (["label_1"], "also has weight and lacks label_1, unlike 0.parquet")],
)
def test_shards_with_other_columns_are_refused(
    tmp_path: Path, drop: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a later shard's weights would be lost, and a column that it lacks would be missed in the middle of a run."""
    table = pick_table(2)
    pq.write_table(table, tmp_path / "0.parquet")
    pq.write_table(table.select(table.column_names[::-1]), tmp_path / "1.parquet")  # another order is none of it
    assert len(open_comparisons(tmp_path)) == 4
    pq.write_table(table.append_column("weight", pa.array([2.0, 2.0])).drop_columns(drop), tmp_path / "2.parquet")
    with pytest.raises(DataError, match=f"2.parquet' {message}; write all shards"):
        open_comparisons(tmp_path)
    assert cli.main(["audit", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_picture_cells_with_bytes_or_path(pictures: Path) -> None:
    cells = [{"bytes": png(77), "path": None}, {"bytes": None, "path": "20.png"}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"prompt": ["a"] * 3, "chosen": pa.array(cells, kind), "rejected": pa.array([cells[0]] * 3, kind)})
    pq.write_table(table, pictures / "x.parquet")
    comparisons = open_comparisons(pictures / "x.parquet")
    assert shades(comparisons, 0) == [77, 77]
    assert shades(comparisons, 1) == [20, 77]
    with pytest.raises(DataError, match="NoneType"):
        comparisons[2].images[0].read()


def test_references_into_parquet(emoji: Path) -> None:
    comparisons = open_comparisons(emoji / "preferences" / "fluent_over_noto-train.jsonl")
    table = pq.read_table(emoji / "emoji.parquet", columns=["image", "style", "caption"])
    for place in (0, 700, len(comparisons) - 1):
        for image, style in zip(comparisons[place].images, ("fluent", "noto"), strict=True):
            row = table.slice(int(image.name.rpartition("#")[2]), 1).to_pylist()[0]
            assert (row["style"], row["caption"]) == (style, comparisons[place].prompt)
            assert image.read() == row["image"]["bytes"]


def test_references_that_point_nowhere(tmp_path: Path) -> None:
    pq.write_table(pick_table(2), tmp_path / "x.parquet")
    names = ["x.parquet#1:jpg_1", "x.parquet#2:jpg_1", "x.parquet#0", "y.parquet#0"]
    rows = [{"prompt": "a", "chosen": name, "rejected": names[0]} for name in names]
    comparisons = open_comparisons(write_jsonl(tmp_path / "votes.jsonl", rows))
    assert shades(comparisons, 0) == [20, 20]
    for place, message in ((1, "rows 0 to 1, not 2"), (2, "no column 'image'")):
        with pytest.raises(DataError, match=message):
            comparisons[place].images[0].read()
    with pytest.raises(DataError, match=r"y\.parquet"):
        comparisons[3]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_webdataset(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for i in range(3):
                add(tar, f"{i:04}.chosen.png", png(10 * shard + i))
                add(tar, f"{i:04}.rejected.png", png(100))
                add(tar, f"{i:04}.json", json.dumps({"prompt": f"{shard} {i}", "weight": 2.5}).encode())
    comparisons = open_comparisons(tmp_path)
    assert [each.prompt for each in comparisons] == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    assert shades(comparisons, 5) == [12, 100]
    assert (comparisons[5].weight, comparisons[5].source) == (2.5, "00001.tar:2")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("unusual", ["", "d/" * 40 + "long" * 20, "ü"])
def test_archives_are_read_as_tarfile_reads_them(tmp_path: Path, form: int, unusual: str) -> None:
    """Sizes around a block, folders, long names and other letters, in every format that tarfile writes."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, size in enumerate((0, 1, 511, 512, 513, 1024)):
            if unusual and number == 4:
                folder = tarfile.TarInfo("a folder")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            add(tar, f"{number}/{unusual}{size}.png" if number == 3 else f"{number}/{size}.png", b"x" * size)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    assert list(_members(path)) == expected
    assert len(expected) == 6
    bare = path.read_bytes()[: expected[-1][1] + 1024]  # without the blocks of zeros at the end
    path.write_bytes(bare)
    assert list(_members(path)) == expected
    path.write_bytes(bare[:-600])
    with pytest.raises(DataError, match="unexpected end of data"):
        list(_members(path))


def test_webdataset_with_pick_a_pic_names_and_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a/1.jpg_0", png(10))
        add(tar, "a/1.jpg_1", png(20))
        add(tar, "a/1.txt", b"a cat\n")
        add(tar, "a/1.label_0.txt", b"0")
        add(tar, "a/1.label_1.txt", b"1")
    comparisons = open_comparisons(tmp_path / "x.tar")
    assert (comparisons[0].prompt, shades(comparisons, 0)) == ("a cat", [20, 10])


def test_datasets(tmp_path: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()})
    rows = {"prompt": ["a", "b"], "chosen": [{"bytes": png(10 + i), "path": None} for i in (0, 1)]}
    data = datasets.Dataset.from_dict(rows | {"rejected": [{"bytes": png(90), "path": None}] * 2}, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    comparisons = open_comparisons(tmp_path / "saved")
    assert [each.prompt for each in comparisons] == ["a", "b"]
    assert shades(comparisons, 1) == [11, 90]
    with pytest.raises(DataError, match="no split 'test'; its splits are train"):
        open_comparisons(tmp_path / "saved", split="test")


def test_a_hub_id_without_a_network_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"cannot load data set 'nobody/nothing', split 'train'.*pass a local file"):
        open_comparisons("nobody/nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format is 'csv'; allowed: auto"),
        ({"tie_policy": "win"}, "tie_policy is 'win'; allowed: drop, soft"),
        ({"order": "worst"}, "order is 'worst'; allowed: given, reversed"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_options_that_do_not_exist(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "votes.jsonl", [PICK])
    with pytest.raises(DataError, match=message):
        open_comparisons(path, **options)


def test_sources_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    (tmp_path / "x.tar").write_bytes(b"not tar" * 1000)
    (tmp_path / "x.csv").touch()
    (tmp_path / "nothing").mkdir()
    for name, message in {
        "empty.jsonl": "is empty",
        "x.parquet": "not a Parquet file",
        "x.tar": "not an uncompressed tar",
        "x.csv": "ends in '.csv'",
        "nothing": "holds no metadata.jsonl",
        "absent.jsonl": "No such file",
        "absent/deep/path": "does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            open_comparisons(tmp_path / name)


def test_ids_do_not_depend_on_where_the_data_lie(tmp_path: Path, pictures: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "20.png", "rejected": "10.png"},
        {"prompt": "a", "chosen": "30.png", "rejected": "10.png"},
    ]
    write_jsonl(pictures / "votes.jsonl", rows)
    pq.write_table(pick_table(6), pictures / "x.parquet", row_group_size=2)
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.copytree(pictures, moved)
    for name in ("votes.jsonl", "x.parquet"):
        here, there = open_comparisons(pictures / name), open_comparisons(moved / name)
        assert [each.id for each in here] == [each.id for each in there]
        assert len({each.id for each in here}) == len(here)
    (moved / "votes.jsonl").write_text("\n" + json.dumps(rows[1]) + "\n")  # nor on the line
    assert open_comparisons(moved / "votes.jsonl")[0].id == open_comparisons(pictures / "votes.jsonl")[1].id


def test_the_same_picture_in_many_rows_has_one_name(pictures: Path) -> None:
    rows = [PICK | {"label_0": 1.0, "label_1": 0.0, "image_0_uid": "u1", "image_1_uid": "u2"}] * 2
    comparisons = open_comparisons(write_jsonl(pictures / "votes.jsonl", rows))
    assert [image.name for image in comparisons[1].images] == ["u1", "u2"]


def test_split_by_prompt(pictures: Path) -> None:
    rows: list[Any] = [{"prompt": f"prompt {i % 40}", "chosen": "10.png", "rejected": f"{i}.png"} for i in range(120)]
    rows.append({"prompt": "", "chosen": "10.png", "rejected": "20.png"})
    comparisons = open_comparisons(write_jsonl(pictures / "votes.jsonl", rows))
    train, held = split_by_prompt(comparisons, 0.25, seed=0)
    assert sorted([*train, *held]) == list(range(121))
    assert 120 in train  # the bad row is not lost
    prompts = [{comparisons[int(place)].prompt for place in part if place < 120} for part in (train, held)]
    assert prompts[0].isdisjoint(prompts[1])
    assert len(prompts[1]) == 10
    assert not np.array_equal(held, split_by_prompt(comparisons, 0.25, seed=1)[1])
    np.testing.assert_array_equal(held, split_by_prompt(comparisons, 0.25, seed=0)[1])
    assert not len(split_by_prompt(comparisons, 0, seed=0)[1])
    assert {comparisons[int(place)].prompt for place in split_by_prompt(comparisons, 0.001, 0)[1]} <= set().union(*prompts)
    assert len(split_by_prompt(comparisons, 0.001, 0)[1]) == 3
    fewer = split_by_prompt(comparisons, 0.25, seed=0, at_most=14)
    assert len(fewer[1]) == 12  # whole prompts of three rows
    assert set(fewer[1]) < set(held)
    assert sorted([*fewer[0], *fewer[1]]) == list(range(121))
    assert len(split_by_prompt(comparisons, 0.25, seed=0, at_most=1)[1]) == 3  # some prompt there must be
    np.testing.assert_array_equal(held, split_by_prompt(comparisons, 0.25, seed=0, at_most=30)[1])
    with pytest.raises(DataError, match="fraction is 1"):
        split_by_prompt(comparisons, 1.0, seed=0)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_many_rows_open_without_being_held(tmp_path: Path, form: str) -> None:
    count = 50_000
    if form == "jsonl":
        path = tmp_path / "votes.jsonl"
        with path.open("w") as file:
            file.writelines(
                f'{{"prompt": "{"long " * 60}{i}", "chosen": "a{i}.png", "rejected": "b{i}.png"}}\n' for i in range(count)
            )
    else:
        path = tmp_path / "votes.parquet"
        names = [f"a{i}.png" for i in range(count)]
        table = pa.table({"prompt": ["long " * 60 + str(i) for i in range(count)], "chosen": names, "rejected": names})
        pq.write_table(table, path, row_group_size=10_000)
        del table, names
    tracemalloc.start()
    comparisons = open_comparisons(path)
    assert len(comparisons) == count
    assert comparisons[count - 1].prompt.endswith(f" {count - 1}")
    assert comparisons[0].prompt.endswith(" 0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * count  # the prompts alone take 300 bytes a row
