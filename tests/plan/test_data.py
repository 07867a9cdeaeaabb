"""Counting comparisons without opening pictures, and the caches' size against real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowalign.data.cache import usage
from flowalign.plan.data import EXACTLY, count
from flowalign.plan.model import outline
from flowalign.plan.page import page
from flowalign.plan.predict import predict
from flowalign.settings import Config
from flowalign.setup import Prepared
from tests.data.test_reach import rows_in
from tests.data.test_reach import write as write_pairs

Settings = Callable[..., Config]


HELD_OUT = ["data.validation=null", "data.held_out=0.3"]


@pytest.mark.parametrize(
    "overrides",
    [["data.flip=true"], HELD_OUT, [*HELD_OUT, "data.validation_limit=4"], ["data.limit=5"], ["data.validation_limit=5"]],
)
def test_counts_and_cache_are_those_of_a_run(prepared: Callable[..., Prepared], tmp_path: Path, overrides: list[str]) -> None:
    ready = prepared(*overrides, "reference.bank=2", f"data.cache={tmp_path / 'cache'}", "train.validation_draws=3")
    found = count(ready.config)
    assert ready.held_out is not None
    assert (found.train, found.held_out, found.exact) == (len(ready.train), len(ready.held_out), True)
    assert len(ready.held_out) <= (ready.config.data.validation_limit or 0)
    disk = found.disk(outline(ready.config), ready.config)
    stores = {store["kind"]: store for store in usage(tmp_path / "cache")["stores"]}
    if "data.validation=null" not in overrides:  # train and validation name the same pictures here, and each counts its own
        assert disk["latents"] is not None
        assert found.pictures == 2 * (len(ready.held_out) + len(ready.train))
        return
    for kind, name in (("images", "latents"), ("prompts", "prompts")):
        header = 350 * stores[kind]["entries"]  # what safetensors puts before the numbers of an entry
        assert disk[name] is not None
        assert disk[name] < stores[kind]["bytes"] < disk[name] + header
    files = list((tmp_path / "cache").glob("bank-*/*.safetensors"))
    assert disk["bank"] == sum(path.stat().st_size - 8 - _header(path) for path in files)


def _header(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("limit", [1000, 3])
def test_of_a_table_what_the_run_prepares_is_counted(prepared: Callable[..., Prepared], tmp_path: Path, limit: int) -> None:
    table = write_pairs("parquet", rows_in(), tmp_path)
    overrides = (f"data.train={table}", "data.validation=null", "data.held_out=0.1", "train.batch_size=1", "train.steps=20")
    ready = prepared(*overrides, f"data.cache={tmp_path / 'cache'}", f"data.validation_limit={limit}")
    found = count(ready.config)
    assert ready.held_out is not None
    assert len(ready.held_out) <= limit
    assert (found.train, found.held_out) == (ready.train.cached.about["comparisons"], len(ready.held_out))
    assert found.prepared == len(ready.train) + len(ready.held_out)
    entries = {store["kind"]: store["entries"] for store in usage(tmp_path / "cache")["stores"]}
    assert entries == {"images": found.pictures, "prompts": found.prompts + 1}
    shown = page(predict(ready.config, 0.3, {}, None))
    assert f"prepared {found.prepared} what the run sees or holds out" in " ".join(shown.split())


def test_ties_and_bad_rows_are_told_from_the_rest(settings: Settings, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"p{place}", "chosen": "same.png", "rejected": f"{place}.png"} for place in range(10)
    ]
    rows += [{"prompt": "tie", "chosen": "a.png", "rejected": "b.png", "preference": 0.5}, {"prompt": "", "chosen": 1}]
    path = write(tmp_path / "votes.jsonl", rows)
    soft, drop = (
        count(settings(tmp_path, f"data.train={path}", "data.validation=null", "data.held_out=0", f"data.tie_policy={policy}"))
        for policy in ("soft", "drop")
    )
    assert (soft.train, drop.train, soft.held_out) == (11, 10, 0)
    assert (soft.pictures, soft.prompts) == (13, 11)  # one picture is in ten rows


def test_a_source_without_a_row_that_can_be_read_is_said(settings: Settings, tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", [{"prompt": "", "chosen": "a", "rejected": "b"}] * 3)
    found = count(settings(tmp_path, f"data.train={path}", "data.validation=null"))
    assert found.train == 0
    assert "none of the first 3 rows can be read" in found.note


def test_groups_are_seen(settings: Settings, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"]}]
    found = count(settings(tmp_path, f"data.train={write(tmp_path / 'groups.jsonl', rows)}", "data.validation=null"))
    assert (found.per_comparison, found.num_chosen) == (4, 2)


def test_a_million_rows_are_counted_without_being_read(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 1_000_000
    picture = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [b"picture"]).cast(pa.binary())
    table = pa.table(
        {
            "caption": pa.array(np.arange(rows) % 5).cast(pa.string()),
            "jpg_0": picture,
            "jpg_1": picture,
            "label_0": np.ones(rows),
            "label_1": np.zeros(rows),
        }
    )
    for shard in range(2):
        pq.write_table(table.slice(shard * rows // 2, rows // 2), tmp_path / f"train-{shard}.parquet", row_group_size=10_000)
    groups: list[int] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, place, **rest: groups.append(place) or real(self, place, **rest)
    )
    overrides = (f"data.train={tmp_path}", "data.format=parquet", "data.validation=null", "data.held_out=0.01")
    config = settings(tmp_path, *overrides, "reference.bank=4")
    found = count(config)
    assert (found.train, found.held_out, found.pictures, found.prompts) == (999_000, 1000, 2 * rows, rows)
    assert not found.exact
    assert f"{EXACTLY:,}" in found.note
    assert len(groups) == 1
    assert found.disk(outline(config), config)["bank"] == 4 * 2 * (999_000 * 4 + 1000)
    assert found.prepared is None  # a bank covers all
    few = count(settings(tmp_path, *overrides, "train.steps=500", "sample.count=3"))
    assert few.train == 999_000
    assert few.prepared == few.prompts == 1000 + 2 * 500 + 8 + 3  # at most: the first ones may be among the steps'
    assert few.pictures == 2 * few.prepared
    seen = count(settings(tmp_path, *overrides, "train.steps=500", "sample.count=3"), processes=4).prepared
    assert seen == 1000 + 4 * 2 * 500 + 8 + 3
    assert count(settings(tmp_path, *overrides, "train.steps=600000")).prepared is None
    assert count(settings(tmp_path, *overrides, "data.limit=30000")).train == 29_700


@pytest.mark.parametrize("source", ["someone/pairs", "s3://bucket/pairs.parquet", "missing.jsonl"])
def test_what_is_not_here_is_said_and_can_be_told(settings: Settings, tmp_path: Path, source: str) -> None:
    config = settings(tmp_path, f"data.train={source}", "data.validation=null", "data.held_out=0.1")
    found = count(config)
    assert (found.train, found.held_out, found.pictures) == (None, None, None)
    assert source in found.note
    assert "--comparisons" in found.note
    assert found.disk(outline(config), config)["latents"] is None
    told = count(config, 1000)
    assert (told.train, told.held_out, told.pictures, told.prompts) == (900, 100, 2000, 1000)
    assert not told.exact


def test_a_validation_source_that_is_not_here_is_said(settings: Settings, tmp_path: Path) -> None:
    found = count(settings(tmp_path, "data.validation=someone/pairs"))
    assert (found.train, found.held_out) == (12, None)
    assert "someone/pairs" in found.note
