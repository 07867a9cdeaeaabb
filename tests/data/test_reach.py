"""A run prepares the comparisons that it sees, and is the run that it would be if all were prepared."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowalign.config import parse
from flowalign.data.audit import audit
from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached
from flowalign.data.fill import fill
from flowalign.data.pairs import PairDataset, PairStream, sequential
from flowalign.data.readers import Comparisons, open_comparisons, split_by_prompt
from flowalign.data.records import CellImage, SpanImage
from flowalign.errors import DataError
from flowalign.rng import Keyed
from flowalign.sources import load_data, prepares_all
from flowalign.train.ranks import Ranks
from tests.data.test_pipeline import SIDE, Named, Together, assert_same, entries, picture, rows_of

ROWS, PROMPTS = 120, 40
FORMS = pytest.mark.parametrize("form", ["parquet", "tar"])
SHORT, LONG, WHOLE = (f"train.steps={steps}" for steps in (20, 60, 500))
"""Of one comparison; the shortest is no less than what suggest-beta looks at."""
Row = dict[str, Any]


def rows_in(count: int = ROWS) -> list[Row]:
    """Pairs of pictures that are all different, over prompts that are not."""
    return [
        {"prompt": f"prompt {(7 * row) % PROMPTS}", "chosen": picture(2 * row), "rejected": picture(2 * row + 1)}
        for row in range(count)
    ]


def write(form: str, rows: Sequence[Row], path: Path, **more: list[Any]) -> Path:
    """A table with row groups of 16, or an archive."""
    path = path / f"votes.{form}"
    if form == "parquet":
        columns = {name: [row[name] for row in rows] for name in rows[0]} | more
        pq.write_table(pa.table(columns), path, row_group_size=16)
        return path
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for ending, data in (
                ("txt", row["prompt"].encode()),
                ("chosen.png", row["chosen"]),
                ("rejected.png", row["rejected"]),
            ):
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def made(folder: Path) -> dict[str, bytes]:
    """Entries of the cache there, without the index."""
    return {name: data for name, data in entries(folder / "cache").items() if not name.startswith("rows-")}


Loaded = tuple[PairDataset, PairDataset | None, dict[str, Any]]


def loaded(source: Path, folder: Path, *overrides: str, ranks: Any = None, family: Named | None = None) -> Loaded:
    """A run of one comparison a step."""
    data = {"train": str(source), "held_out": 0.1, "cache": str(folder / "cache")}
    tree = {"model": {"checkpoint": "none"}, "data": data, "train": {"batch_size": 1}, "sample": {"count": 3}}
    alone = Ranks(SimpleNamespace(num_processes=1, process_index=0), 60.0)  # type: ignore[arg-type]
    config = parse(tree, "test", overrides)
    return load_data(config, family or Named(), folder, False, ranks or alone)  # type: ignore[arg-type]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Names of the pictures that were read since it was last asked."""
    found: set[str] = set()
    for kind in (CellImage, SpanImage):
        before = kind.read

        def noted(self: Any, before: Any = before) -> bytes:
            if not self.name.endswith(":txt"):
                found.add(self.name)
            return before(self)

        monkeypatch.setattr(kind, "read", noted)

    def asked() -> set[str]:
        names = set(found)
        found.clear()
        return names

    return asked


def names(comparisons: Comparisons, places: Sequence[int] | np.ndarray) -> set[str]:
    return {image.name for place in places for image in comparisons[int(place)].images}


def expected(comparisons: Comparisons, positions: int) -> tuple[set[int], np.ndarray]:
    """Places that a run of so many positions needs, held out ones among them, and those that there are to train on."""
    train, held = split_by_prompt(comparisons, 0.1, 0)
    order = Keyed(0).permutation("order", 0, len(train)).numpy()
    prompts = list(dict.fromkeys(comparisons[int(place)].prompt for place in train))[:3]
    firsts = [next(int(place) for place in train if comparisons[int(place)].prompt == prompt) for prompt in prompts]
    return {*train[order[:positions]].tolist(), *train[:8].tolist(), *firsts, *held.tolist()}, train


def stream(dataset: PairDataset, count: int, start: int = 0) -> list[Any]:
    return list(islice(PairStream(dataset, 0, batch_size=1, position=start, caption_dropout=0.2), count))


def assert_same_stream(one: PairDataset, other: PairDataset, count: int, start: int = 0) -> None:
    for left, right in zip(stream(one, count, start), stream(other, count, start), strict=True):
        assert_same(left, right)


def as_before(source: Path, folder: Path) -> PairDataset:
    """All that there is to train on, filled at once and put in order without any of what is tested here."""
    comparisons, family = open_comparisons(source), Named()
    cache = LatentCache(folder, family.fingerprint("images"), family.fingerprint("prompts"), resolution=SIDE)
    return PairDataset(cache, fill(cache, comparisons, split_by_prompt(comparisons, 0.1, 0)[0], family, progress=False))


@FORMS
def test_a_first_start_reads_the_pictures_that_the_run_sees(tmp_path: Path, read: Any, form: str) -> None:
    source = write(form, rows_in(), tmp_path)
    needed, train = expected(open_comparisons(source), 20)
    assert len(needed) < 50
    found, held, about = loaded(source, tmp_path, SHORT)
    assert read() == names(open_comparisons(source), sorted(needed))
    assert held is not None
    assert about["prepared"] == {"train": len(found), "held_out": len(held)}
    assert len(found) + len(held) == len(needed)
    assert about["train"] == audit(open_comparisons(source), train)
    written = [path for path in (tmp_path / "cache").glob("images-*/??/*") if path.suffix == ".safetensors"]
    assert len(written) == 2 * len(needed)
    loaded(source, tmp_path, SHORT)
    assert read() == set()


@FORMS
def test_a_run_is_what_it_would_be_if_all_were_prepared(tmp_path: Path, form: str) -> None:
    source = write(form, rows_in(), tmp_path)
    short, held, _ = loaded(source, tmp_path / "short", SHORT)
    whole, all_held, _ = loaded(source, tmp_path / "whole", WHOLE)
    before = as_before(source, tmp_path / "before")
    assert held is not None
    assert all_held is not None
    assert len(short) < len(whole) == len(before)
    assert_same_stream(short, before, 20)
    assert_same_stream(whole, before, 250)  # over three epochs
    for left, right in zip(islice(sequential(short, 1), 8), islice(sequential(before, 1), 8), strict=True):
        assert_same(left, right)
    for left, right in zip(sequential(held, 4), sequential(all_held, 4), strict=True):
        assert_same(left, right)
    assert short.cached.prompts[:3] == before.cached.prompts[:3]
    assert short.cached.about == whole.cached.about == before.cached.about  # what a saved state must agree with


@FORMS
def test_a_longer_run_after_a_short_one_adds_what_it_sees(tmp_path: Path, read: Any, form: str) -> None:
    source = write(form, rows_in(), tmp_path)
    comparisons = open_comparisons(source)
    (some, _), (more, _) = expected(comparisons, 20), expected(comparisons, 60)
    loaded(source, tmp_path, SHORT)
    read()
    longer = loaded(source, tmp_path, LONG)[0]
    assert read() == names(comparisons, sorted(more - some))
    once = loaded(source, tmp_path / "once", LONG)[0]
    read()
    for field in {field.name for field in dataclasses.fields(Cached)} - {"among"}:
        np.testing.assert_array_equal(getattr(longer.cached, field), getattr(once.cached, field), err_msg=field)
    assert_same_stream(longer, once, 60)
    for steps in (SHORT, LONG):  # an index serves every length up to its own
        again = loaded(source, tmp_path, steps)[0]
        assert read() == set()
        assert_same_stream(again, once, 20)
    assert len(loaded(source, tmp_path, WHOLE)[0]) == len(expected(comparisons, 0)[1])
    assert len(read()) == 2 * (ROWS - len(more))


@FORMS
def test_fills_of_several_lengths_leave_the_entries_of_a_full_one(tmp_path: Path, form: str) -> None:
    source = write(form, rows_in(), tmp_path)
    whole = tmp_path / "whole"
    loaded(source, whole, WHOLE)
    full = made(whole)
    for folder, lengths in (("short", [SHORT]), ("long", [LONG]), ("both", [SHORT, LONG, WHOLE])):
        for steps in lengths:
            loaded(source, tmp_path / folder, steps)
        found = made(tmp_path / folder)
        assert found.keys() <= full.keys()
        assert all(full[name] == data for name, data in found.items())
    assert found == full


def broken(rows: list[Row], places: Sequence[int]) -> list[Row]:
    return [row | {"rejected": row["rejected"][:100]} if place in places else row for place, row in enumerate(rows)]


@FORMS
def test_a_broken_picture_is_stood_in_for_by_what_comes_next(tmp_path: Path, read: Any, form: str) -> None:
    """However much is prepared: the order is that of all rows, without the broken ones."""
    source = write(form, rows_in(), tmp_path)
    train = expected(open_comparisons(source), 20)[1]
    order = train[Keyed(0).permutation("order", 0, len(train)).numpy()]
    bad = [int(order[3]), int(order[11]), int(order[20]), int(order[90])]
    source = write(form, broken(rows_in(), bad), tmp_path)
    good = [int(place) for place in order if place not in bad]
    short, _, about = loaded(source, tmp_path / "short", SHORT)
    assert about["bad_rows"] == 3  # the fourth is not reached
    listed = [json.loads(line)["row"] for line in (tmp_path / "short/bad_rows.jsonl").read_text().splitlines()]
    assert listed == sorted(bad[:3])
    ids = dict(zip(short.cached.ids.tolist(), short.cached.indices.tolist(), strict=True))
    assert [ids[batch.ids[0]] for batch in stream(short, 20)] == good[:20]
    whole, _, about = loaded(source, tmp_path / "whole", WHOLE)
    assert about["bad_rows"] == 4
    ids = dict(zip(whole.cached.ids.tolist(), whole.cached.indices.tolist(), strict=True))
    assert [ids[batch.ids[0]] for batch in stream(whole, len(good))] == good
    assert sorted(ids[batch.ids[0]] for batch in stream(whole, len(good), len(good))) == sorted(good)  # the second epoch
    for steps in (LONG, WHOLE):
        grown = loaded(source, tmp_path / "short", steps)[0]
        assert_same_stream(grown, whole, 60)
        assert grown.cached.about == whole.cached.about == short.cached.about
    read()
    loaded(source, tmp_path / "short", LONG)
    assert read() == set()  # what is known to be broken is not tried again
    with pytest.raises(DataError, match="rejected"):
        loaded(source, tmp_path / "error", SHORT, "data.on_bad_row=error")


def test_a_run_of_which_all_is_broken_is_refused(tmp_path: Path) -> None:
    source = write("parquet", broken(rows_in(30), range(30)), tmp_path)
    with pytest.raises(DataError, match=r"none of the \d+ comparisons can be used; the first reason"):
        loaded(source, tmp_path, SHORT, "data.held_out=0")


def test_rows_whose_fields_cannot_be_used_are_known_before_and_change_no_order(tmp_path: Path) -> None:
    """As before: the order is one of the rows that can be used."""
    rows = [row | {"prompt": "" if place % 9 == 4 else row["prompt"]} for place, row in enumerate(rows_in())]
    source = write("parquet", rows, tmp_path)
    short, _, about = loaded(source, tmp_path / "short", SHORT)
    before = as_before(source, tmp_path / "before")
    assert_same_stream(short, before, 20)
    assert short.cached.about == before.cached.about
    assert about["bad_rows"] == len([row for row in rows if not row["prompt"]])
    assert about["train"]["comparisons"] == len(before)
    with pytest.raises(DataError, match=r"votes.parquet:4: .*prompt"):
        loaded(source, tmp_path / "error", SHORT, "data.on_bad_row=error")


def test_a_place_after_what_was_prepared_is_refused(tmp_path: Path) -> None:
    found = loaded(write("parquet", rows_in(), tmp_path), tmp_path, SHORT)[0]
    with pytest.raises(DataError, match=r"only the \d+ comparisons were prepared.*train\.steps"):
        stream(found, ROWS)
    with pytest.raises(DataError, match="only the"):
        next(iter(PairStream(found, 0, batch_size=1, position=ROWS)))
    ahead = PairStream(found, 0, batch_size=4, workers=1)  # which asks for places before they are wanted
    assert [row.ids for row in rows_of(list(islice(ahead, 5)))] == [batch.ids for batch in stream(found, 20)]


def test_the_first_rows_count_and_equal_pictures_are_encoded_once(tmp_path: Path, read: Any) -> None:
    rows = rows_in()
    rows = [row | {"rejected": rows[place % 2]["rejected"]} for place, row in enumerate(rows)]
    source = write("parquet", rows, tmp_path)
    family = Named()
    loaded(source, tmp_path, SHORT, "data.limit=50", family=family)
    comparisons = open_comparisons(source, limit=50)
    needed = expected(comparisons, 20)[0]
    assert read() == names(comparisons, sorted(needed))
    assert family.images == len(needed) + 2


def test_what_a_cache_has_lost_is_made_again(tmp_path: Path) -> None:
    source = write("parquet", rows_in(), tmp_path)
    loaded(source, tmp_path, LONG)
    before = made(tmp_path)
    for path in list((tmp_path / "cache").glob("images-*/??/*.safetensors"))[:3]:
        path.unlink()
    loaded(source, tmp_path, LONG)
    assert made(tmp_path) == before


class Several(Together):
    """As `Ranks` has it."""

    @property
    def main(self) -> bool:
        return self.index == 0


@FORMS
def test_processes_prepare_together_and_agree_on_an_index(tmp_path: Path, form: str) -> None:
    source = write(form, broken(rows_in(), [2, 3, 5, 8]), tmp_path)
    alone = loaded(source, tmp_path / "alone", "train.steps=60")[0]
    barrier, told = threading.Barrier(2), [None] * 2
    for steps in (SHORT, "train.steps=30"):  # of two comparisons now

        def one(index: int, steps: str = steps) -> Cached:
            return loaded(source, tmp_path / "shared", steps, ranks=Several(index, barrier, told))[0].cached

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(one, range(2))
        for field in {field.name for field in dataclasses.fields(Cached)} - {"among"}:
            np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    for field in {field.name for field in dataclasses.fields(Cached)} - {"among", "bad"}:
        np.testing.assert_array_equal(getattr(first, field), getattr(alone.cached, field))


def test_the_forecast_speaks_of_what_will_be_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write("parquet", rows_in(), tmp_path)
    needed = expected(open_comparisons(source), 20)[0]
    ranks = Ranks(SimpleNamespace(num_processes=1, process_index=0), 60.0)  # type: ignore[arg-type]
    data = {"train": str(source), "held_out": 0.1, "cache": str(tmp_path / "cache")}
    tree = {"model": {"checkpoint": "none"}, "data": data, "train": {"batch_size": 1, "steps": 20}}
    load_data(parse(tree), Named(), tmp_path, True, ranks)  # type: ignore[arg-type]
    said = [line for line in capsys.readouterr().err.splitlines() if "more pictures takes about" in line]
    counts = [int(line.partition("caching ")[2].partition(" ")[0].replace(",", "")) for line in said]
    assert 0 < sum(counts) < 2 * len(needed)


ALL = {
    "a bank": ["reference.bank=2"],
    "weights": ["steer.objectives=[a, b]"],
    "users": ["users={}"],
    "annotators": ["switches.annotator_types=2"],
    "masks": ["switches.mask=given"],
    "stored noise": ["switches.noise=stored"],
    "the gap of scores": ["switches.pair_scale=gap"],
    "grades": ["objective.name=plackett_luce"],
}


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_a_run_that_looks_at_something_of_all_rows_prepares_them(overrides: list[str]) -> None:
    tree = {"model": {"checkpoint": "none"}, "data": {"train": "none"}}
    assert not prepares_all(parse(tree))
    assert prepares_all(parse(tree, "test", overrides))


def test_a_bank_covers_all_rows_and_files_are_all_read(tmp_path: Path) -> None:
    rows = rows_in(40)
    source = write("parquet", rows, tmp_path)
    train = expected(open_comparisons(source), 0)[1]
    assert len(loaded(source, tmp_path, "train.steps=1", "reference.bank=1")[0]) == len(train)
    for place, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            (tmp_path / f"{place}-{side}.png").write_bytes(row[side])
            row[side] = f"{place}-{side}.png"
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), tmp_path / "paths.parquet")
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("paths.parquet", "votes.jsonl"):
        assert len(loaded(tmp_path / name, tmp_path / "files", "train.steps=1")[0]) == len(train)


@pytest.mark.usefixtures("one_thread")
@FORMS
def test_a_run_lengthened_later_ends_like_one_that_was_longer_from_the_start(
    tmp_path: Path, settings: Callable[..., Any], form: str
) -> None:
    from flowalign import runs

    source = write(form, broken(rows_in(), [1, 4, 50, 77]), tmp_path)
    more = (
        f"data.train={source}",
        "data.validation=null",
        "data.held_out=0.05",
        "train.batch_size=4",
        "train.validate_every=8",
    )
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for folder, steps in ((cut, 4), (cut, 20), (whole, 20)):
        config = settings(folder, *more, f"data.cache={folder}/cache", f"train.steps={steps}")
        runs.align(config, resume=(folder / "config.yaml").exists(), progress=False)
    weights = "weights/pytorch_lora_weights.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
    data = json.loads((cut / "data.json").read_text())
    assert data == json.loads((whole / "data.json").read_text())
    assert data["prepared"]["train"] < data["train"]["comparisons"]
