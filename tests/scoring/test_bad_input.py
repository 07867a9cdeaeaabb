"""Thirty-odd kinds of bad input: each is scored as it should be, or reported in one sentence, and nothing beside it is lost."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flowalign.data import images
from flowalign.errors import DataError
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import Scorer, score
from flowalign.scoring.sources import open_items
from flowalign.scoring.table import ScoreTable, read_table
from tests.scoring.pixels import Brightness, Lettered, Means, encoded, folder_of

RED = Image.new("RGB", (16, 16), (255, 0, 0))
THIRD = 1 / 3
"""Brightness of RED."""


def scored(source: Path, tmp_path: Path) -> ScoreTable:
    tower = Means()
    scorer = Scorer([Brightness(tower), Lettered(tower)], ScoreCache(tmp_path / "cache"), batch_size=4)
    score(open_items(source), scorer, tmp_path / "out.parquet", progress=False)
    return read_table(tmp_path / "out.parquet")


def animated(format: str) -> bytes:
    return encoded(RED, format, save_all=True, append_images=[Image.new("RGB", (16, 16), (0, 0, 255))], lossless=True)


def turned(orientation: int) -> bytes:
    """Left half red, right half black, with an EXIF orientation."""
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "PNG", exif=exif)


def transparent() -> bytes:
    """Red under nothing: white."""
    return encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))


def palette() -> bytes:
    image = Image.new("P", (16, 16))
    image.putpalette([255, 0, 0, 0, 255, 0])
    return encoded(image, transparency=1)


def bomb() -> bytes:
    """A PNG header that promises 60,000 × 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


GOOD: dict[str, tuple[Callable[[], bytes], float]] = {
    "animated GIF": (lambda: animated("GIF"), THIRD),
    "animated WebP": (lambda: animated("WEBP"), THIRD),
    "animated PNG": (lambda: animated("PNG"), THIRD),
    "CMYK JPEG": (lambda: encoded(RED.convert("CMYK"), "JPEG", quality=95), THIRD),
    "16-bit grey PNG": (lambda: encoded(Image.fromarray(np.full((16, 16), 0x8000, np.uint16))), 128 / 255),
    "palette with transparency": (palette, THIRD),
    "grey with alpha": (lambda: encoded(Image.new("LA", (16, 16), (0, 0))), 1.0),
    "transparent": (transparent, 1.0),
    "one bit": (lambda: encoded(Image.new("1", (16, 16), 1)), 1.0),
    "one pixel": (lambda: encoded(RED.resize((1, 1))), THIRD),
    "very wide": (lambda: encoded(RED.resize((4000, 1))), THIRD),
    "TIFF": (lambda: encoded(RED, "TIFF"), THIRD),
    "WebP named png": (lambda: encoded(RED, "WEBP", lossless=True), THIRD),
    **{f"EXIF orientation {way}": (lambda way=way: turned(way), THIRD / 2) for way in range(1, 9)},  # type: ignore[misc]
}
BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"this is no picture",
    "truncated PNG": lambda: encoded(Image.effect_noise((64, 64), 90))[:900],
    "truncated JPEG": lambda: encoded(Image.effect_noise((64, 64), 90), "JPEG")[:700],
    "truncated WebP": lambda: encoded(Image.effect_noise((64, 64), 90), "WEBP", lossless=True)[:700],
    "decompression bomb": bomb,
    "half a header": lambda: encoded(RED)[:20],
    "zip": lambda: b"PK\x03\x04" + b"\0" * 64,
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_are_scored_as_what_they_show(tmp_path: Path, name: str) -> None:
    make, wanted = GOOD[name]
    source = folder_of(tmp_path / "p", 2)
    (source / "0001.png").write_bytes(make())
    assert scored(source, tmp_path).raw("brightness")[1] == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("way", range(1, 9))
def test_pictures_are_turned_upright(way: int) -> None:
    upright = np.asarray(images.decode(turned(way)))[..., 0] > 128
    place = {1: np.s_[:, :8], 2: np.s_[:, 8:], 3: np.s_[:, 8:], 4: np.s_[:, :8]} | {5: np.s_[:8], 6: np.s_[:8]}
    place |= {7: np.s_[8:], 8: np.s_[8:]}
    assert upright[place[way]].all()
    assert upright.sum() == 128


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_reported_and_the_rest_is_scored(tmp_path: Path, name: str) -> None:
    source = folder_of(tmp_path / "p", 6)
    (source / "0003.png").write_bytes(BAD[name]())
    table = scored(source, tmp_path)
    assert np.isnan(table.raw("brightness")).tolist() == [n == 3 for n in range(6)]
    why = str(table.texts("why.brightness")[3])
    assert why
    assert "\n" not in why
    assert "Traceback" not in why
    assert table.texts("image")[3] is None
    assert [each for n, each in enumerate(table.texts("why.brightness")) if n != 3] == [None] * 5


def test_what_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 3)
    (source / "a.png").mkdir()
    (source / "b.png").symlink_to(source / "nowhere.png")
    (source / "c.png").symlink_to(source / "d.png")
    (source / "d.png").symlink_to(source / "c.png")
    table = scored(source, tmp_path)
    found = dict(zip([Path(str(path)).name for path in table.texts("path")], table.texts("why.brightness"), strict=True))
    assert {name for name, why in found.items() if why is None} == {f"{n:04d}.png" for n in range(3)}
    assert all("cannot read picture" in str(found[name]) for name in ("a.png", "b.png", "c.png", "d.png"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    """A file without permission is none to root; one whose reading fails is unreadable to all."""
    source = folder_of(tmp_path / "p", 4)
    (source / "0001.png").unlink()
    (source / "0001.png").symlink_to("/proc/self/mem")
    (source / "0002.png").chmod(0)
    why = scored(source, tmp_path).texts("why.brightness")
    assert "cannot read picture" in str(why[1])
    assert "Input/output error" in str(why[1])
    assert os.geteuid() == 0 or "Permission denied" in str(why[2])
    assert (why[0], why[3]) == (None, None)


def test_a_name_that_is_not_text_is_no_reason(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 2)
    (source / os.fsdecode(b"sh\xe9.png")).write_bytes(encoded(RED))
    table = scored(source, tmp_path)
    assert table.raw("brightness")[2] == pytest.approx(THIRD)
    assert str(table.texts("path")[2]).endswith("sh?.png")


def test_a_loop_of_folders_is_not_followed(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 2)
    (source / "inner").mkdir()
    (source / "inner" / "again").symlink_to(source, target_is_directory=True)
    assert len(scored(source, tmp_path)) == 2


def test_a_picture_outside_of_the_folder_is_what_the_row_says(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 1, None)
    (tmp_path / "elsewhere.png").write_bytes(encoded(RED))
    names = ["0000.png", "../elsewhere.png", str(tmp_path / "elsewhere.png")]
    (source / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "prompt": "x"}) + "\n" for name in names))
    table = scored(source, tmp_path)
    assert table.raw("brightness")[1:].tolist() == pytest.approx([THIRD, THIRD])
    assert table.texts("path")[1:] == [str(tmp_path / "elsewhere.png")] * 2


def test_a_column_that_some_rows_lack_costs_those_rows(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 3, None)
    rows = [{"file_name": "0000.png", "prompt": "x"}, {"prompt": "x"}, {"file_name": "0002.png"}]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = scored(source, tmp_path)
    assert [why is None for why in table.texts("why.brightness")] == [True, False, True]
    assert [why is None for why in table.texts("why.lettered")] == [True, False, False]
    assert "has no prompt" in str(table.texts("why.lettered")[2])


@pytest.mark.parametrize("label", [float("nan"), "often", None, -1])
def test_a_vote_that_means_nothing_costs_its_row(tmp_path: Path, label: object) -> None:
    folder_of(tmp_path, 4, None)
    rows = [
        {"caption": "x", "jpg_0": f"000{n}.png", "jpg_1": f"000{n + 1}.png", "label_0": label if n == 2 else 1, "label_1": 0}
        for n in (0, 2)
    ]
    (tmp_path / "votes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = scored(tmp_path / "votes.jsonl", tmp_path)
    assert [why is None for why in table.texts("why.brightness")] == [True, True, False]
    assert table.texts("path")[2] == "votes.jsonl:2"


def test_a_table_that_is_damaged_in_the_middle_costs_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    data = [{"image": encoded(Image.effect_noise((32, 32), n + 1)), "prompt": "x"} for n in range(30)]
    pq.write_table(pa.Table.from_pylist(data), path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    why = scored(path, tmp_path).texts("why.brightness")
    assert all(each is None for each in (*why[:10], *why[20:]))
    assert any(each is not None for each in why[10:20])


PROMPTS = {
    "emoji": "\U0001f600\U0001f3fd family \U0001f468‍\U0001f469‍\U0001f467",
    "right to left": "‏صورة ثعلب أحمر",
    "null character": "a\0b",
    "two lines": "one\ntwo",
    "very long": "word " * 5000,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_odd_prompts_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    source, prompt = folder_of(tmp_path / "p", 2, None), PROMPTS[name]
    rows = [{"file_name": f"{n:04d}.png", "prompt": text} for n, text in enumerate(("plain", prompt))]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = scored(source, tmp_path)
    assert table.texts("prompt")[1] == prompt
    assert table.raw("lettered")[1] - table.raw("brightness")[1] == pytest.approx(len(prompt), abs=1e-2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": ""}, "the prompt is blank"),
        ({"prompt": " \t "}, "the prompt is blank"),
        ({"prompt": None}, "has no prompt"),
        ({"prompt": 7}, "the prompt is 7; it must be text"),
        ({"prompt": "half \ud83d"}, "is not Unicode text"),
        ({"prompt": "x", "seed": float("nan")}, None),
        ({"prompt": "x", "seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"prompt": "x", "seed": 2**70}, "it must be a whole number"),
        ({"prompt": "x", "seed": "abc"}, "seed is 'abc'"),
        ({"prompt": "x", "file_name": None}, "missing or null"),
        ({"prompt": "x", "file_name": "../../etc/nothing.png"}, "cannot read picture"),
        ({"prompt": "x", "file_name": "/nowhere/at/all.png"}, "cannot read picture"),
        ({"prompt": "x", "file_name": 3}, "it must be a path"),
        ({"prompt": "x", "file_name": "t.parquet#9"}, "cannot read"),
    ],
)
def test_rows_with_odd_values_are_scored_or_reported(tmp_path: Path, row: dict[str, object], said: str | None) -> None:
    source = folder_of(tmp_path / "p", 3, None)
    rows = [{"file_name": f"{n:04d}.png", "prompt": "plain"} | (row if n == 1 else {}) for n in range(3)]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = scored(source, tmp_path)
    why = table.texts("why.lettered")
    assert (why[0], why[2]) == (None, None)
    assert why[1] is None if said is None else said in str(why[1])
    assert bool(np.isnan(table.raw("lettered")[1])) == (said is not None)


def test_lines_that_are_not_json_are_reported(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 4, None)
    lines = [json.dumps({"file_name": f"{n:04d}.png", "prompt": "plain"}).encode() for n in range(4)]
    lines[1] = lines[1][:-1] + b",}"
    lines[2] = lines[2].replace(b"plain", b"pl\xffin")
    (source / "metadata.jsonl").write_bytes(b"\r\n".join(lines))
    table = scored(source, tmp_path)
    why = table.texts("why.brightness")
    assert (why[0], why[3]) == (None, None)
    assert "not valid JSON" in str(why[1])
    assert "not valid JSON" in str(why[2])
    assert table.texts("path")[1] == "metadata.jsonl:2"


def test_a_row_that_stands_twice_stays_twice(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 1, None)
    (source / "metadata.jsonl").write_text((json.dumps({"file_name": "0000.png", "prompt": "plain"}) + "\n") * 3)
    table = scored(source, tmp_path)
    assert len(table) == 3
    assert len({*table.raw("lettered")}) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", b"", "is empty"),
        ("a.parquet", b"not parquet at all", "is not a Parquet file"),
        ("a.tar", b"not an archive" * 100, "tar"),
        ("a.json", b"[{", "is not a JSON array"),
        ("a.csv", b"x,y", "ends in '.csv'"),
        ("a.jsonl", b'{"sound": "a.wav"}', "none is a picture"),
    ],
)
def test_sources_that_cannot_be_read_are_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_items(tmp_path / name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_there_are_enough_kinds() -> None:
    assert len(GOOD) + len(BAD) + len(PROMPTS) >= 30
