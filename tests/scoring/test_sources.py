"""Every kind of source gives the same pictures, prompts, seeds and generators."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowalign.data.readers import open_comparisons
from flowalign.data.writer import can_be_named, write_comparisons
from flowalign.errors import DataError
from flowalign.scoring.sources import Items, open_items
from tests.scoring.pixels import encoded, folder_of, picture

COUNT = 5


def rows() -> list[dict[str, object]]:
    return [{"prompt": f"thing {n}", "seed": 10 + n, "generator": "tiny-sd"} for n in range(COUNT)]


def files(folder: Path) -> Path:
    return folder_of(folder / "bare", COUNT)


def metadata(folder: Path) -> Path:
    folder_of(folder / "drawn", COUNT, None)
    lines = [json.dumps({"file_name": f"{n:04d}.png"} | row) for n, row in enumerate(rows())]
    (folder / "drawn" / "metadata.jsonl").write_text("\r\n".join(lines) + "\r\n")
    return folder / "drawn"


def jsonl(folder: Path) -> Path:
    folder_of(folder / "p", COUNT, None)
    lines = [json.dumps({"image": f"p/{n:04d}.png"} | row) for n, row in enumerate(rows())]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def parquet(folder: Path) -> Path:
    data = [{"image": {"bytes": encoded(picture(n)), "path": None}} | row for n, row in enumerate(rows())]
    pq.write_table(pa.Table.from_pylist(data), folder / "table.parquet", row_group_size=2)
    return folder / "table.parquet"


def archive(folder: Path) -> Path:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, row in enumerate(rows()):
            for name, data in (("png", encoded(picture(number))), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder / "shard.tar"


def data_set(folder: Path) -> Path:
    import datasets

    data = [{"image": {"bytes": encoded(picture(n)), "path": None}} | row for n, row in enumerate(rows())]
    datasets.Dataset.from_list(data).cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    return folder / "saved"


def read(items: Items) -> list[tuple[bytes, str | None, int | None, str | None]]:
    found = [items.item(place) for place in range(len(items))]
    return [(each.image.read(), each.prompt, each.seed, each.generator) for each in found if each.image is not None]


WANTED = [(encoded(picture(n)), f"thing {n}", 10 + n, "tiny-sd") for n in range(COUNT)]


@pytest.mark.parametrize("make", [metadata, jsonl, parquet, archive, data_set])
def test_sources_give_the_same_pictures(tmp_path: Path, make: object) -> None:
    assert read(open_items(make(tmp_path))) == WANTED  # type: ignore[operator]


def test_a_bare_folder_takes_prompts_from_beside_from_the_command_or_from_nowhere(tmp_path: Path) -> None:
    folder = files(tmp_path)
    assert [row[:2] for row in read(open_items(folder))] == [row[:2] for row in WANTED]
    assert {row[1] for row in read(open_items(folder, prompt="all alike"))} == {"all alike"}
    assert {row[1] for row in read(open_items(folder_of(tmp_path / "silent", 2, None)))} == {None}


def test_comparisons_give_each_picture_and_prompt_once(tmp_path: Path) -> None:
    folder_of(tmp_path, 3, None)
    names = [f"{n:04d}.png" for n in range(3)]
    votes = [("a", names[0], names[1]), ("a", names[1], names[0]), ("a", names[2], names[0]), ("b", names[0], names[1])]
    lines = [json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) for prompt, chosen, rejected in votes]
    (tmp_path / "votes.jsonl").write_text("\n".join(lines))
    items = open_items(tmp_path / "votes.jsonl")
    found = [(Path(item.path).name, item.prompt) for item in map(items.item, range(len(items)))]
    assert found == [(names[0], "a"), (names[1], "a"), (names[2], "a"), (names[0], "b"), (names[1], "b")]
    told = open_items(tmp_path / "votes.jsonl", prompt="c")
    assert [(Path(told.item(n).path).name, told.item(n).prompt) for n in range(len(told))] == [(name, "c") for name in names]


@pytest.mark.parametrize("make", [files, metadata, jsonl, parquet])
def test_the_path_of_a_picture_can_be_named_in_a_comparison(tmp_path: Path, make: object) -> None:
    items = open_items(make(tmp_path))  # type: ignore[operator]
    paths = [items.item(place).path for place in range(2)]
    assert all(map(can_be_named, paths))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pairs.jsonl").write_text(json.dumps({"prompt": "x", "chosen": paths[0], "rejected": paths[1]}))
    pair = open_comparisons(elsewhere / "pairs.jsonl")[0]
    assert [image.read() for image in pair.images] == [encoded(picture(0)), encoded(picture(1))]


@pytest.mark.parametrize("column", ["my-image", "ein Bild", "a:b"])
def test_a_column_of_any_name_can_be_named_in_a_comparison(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({column: [encoded(picture(n)) for n in range(2)]}), tmp_path / "t.parquet")
    items = open_items(tmp_path / "t.parquet", image_column=column)
    paths = [items.item(place).path for place in range(2)]
    assert all(map(can_be_named, paths))
    write_comparisons(tmp_path / "in" / "pairs.jsonl", [{"prompt": "x", "images": paths, "num_chosen": 1}])
    pair = open_comparisons(tmp_path / "in" / "pairs.jsonl")[0]
    assert [image.name for image in pair.images] == [f"../t.parquet#{row}:{column}" for row in range(2)]
    assert [image.read() for image in pair.images] == [encoded(picture(0)), encoded(picture(1))]


def test_what_an_archive_holds_has_a_place_for_people_only(tmp_path: Path) -> None:
    path = open_items(archive(tmp_path)).item(3).path
    assert path == "shard.tar:3"
    assert not can_be_named(path)
    saved = data_set(tmp_path).absolute()
    path = open_items(saved).item(3).path
    assert path == "saved:3"
    assert not can_be_named(path)


def test_columns_can_be_named(tmp_path: Path) -> None:
    data = [{"a": encoded(picture(n)), "b": encoded(picture(n + 9)), "words": f"thing {n}"} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "t.parquet")
    items = open_items(tmp_path / "t.parquet", image_column="b", prompt_column="words")
    assert [row[:2] for row in read(items)] == [(encoded(picture(n + 9)), f"thing {n}") for n in range(2)]
    with pytest.raises(DataError, match=r"has the columns a, b, words, of which none is a picture .*--image-column"):
        open_items(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"has no column 'c'; allowed: a, b, words"):
        open_items(tmp_path / "t.parquet", image_column="c")


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no picture"):
        open_items(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_items(tmp_path / "nothing" / "here")
