"""Cache, filling, batches and audit, from comparison files to Batch, with a small encoder of our own."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.config import parse
from flowalign.data.audit import audit
from flowalign.data.batch import Batch, Conditioning
from flowalign.data.cache import LatentCache, clear, usage
from flowalign.data.cached import Cached
from flowalign.data.fill import fill
from flowalign.data.forecast import amount
from flowalign.data.images import decode, fit
from flowalign.data.pairs import PairDataset, PairStream, sequential
from flowalign.data.readers import open_comparisons
from flowalign.errors import ConfigError, DataError, NonFiniteError
from flowalign.sources import load_data
from flowalign.train.ranks import Ranks

SIDE = 16


class TinyEncoder:
    """Pictures through a fixed convolution, prompts to their bytes; counts what it is asked for."""

    multiple = 8

    def __init__(self) -> None:
        self.weight = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.images = self.prompts = 0
        self.sizes: set[int] = set()

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        self.images += len(torch.unique(pixels, dim=0))
        self.sizes.add(len(pixels))
        mean = torch.nn.functional.conv2d(pixels, self.weight, stride=8)
        return mean, mean.abs() / 10

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts += len(set(prompts))
        codes = torch.tensor([list(prompt.encode().ljust(12, b"\0")[:12]) for prompt in prompts])
        return Conditioning(
            {"embeds": codes.to(torch.float16).unsqueeze(-1), "length": torch.tensor([len(p) for p in prompts])}
        )


def picture(seed: int, width: int = 20, height: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    """Seven comparisons over six pictures and three prompts: a tie in row 2, the same picture twice in row 3."""
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed, 20 + seed, 16 + 2 * seed))
    pairs = [(0, 1), (2, 3), (4, 5), (0, 0), (1, 2), (3, 0), (5, 4)]
    rows: list[dict[str, Any]] = [
        {"prompt": f"prompt {place % 3}", "chosen": f"{a}.png", "rejected": f"{b}.png"} for place, (a, b) in enumerate(pairs)
    ]
    rows[2] |= {"preference": 0.5, "weight": 3.0}
    return write(tmp_path, rows)


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    return LatentCache(tmp_path / "cache", "vae", "text", resolution=SIDE, checkpoint="tiny")


def filled(cache: LatentCache, votes: Path, family: TinyEncoder | None = None, **options: Any) -> Cached:
    comparisons = open_comparisons(votes)
    options = {"batch_size": 4, "progress": False} | options
    return fill(cache, comparisons, range(len(comparisons)), family or TinyEncoder(), **options)


def entries(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def assert_same(left: Batch, right: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, Conditioning):
            assert a.tensors.keys() == b.tensors.keys()
            assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        elif isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=field.name)
        else:
            assert a == b, field.name


def rows_of(batches: Sequence[Batch]) -> list[Batch]:
    """One Batch of one comparison for every comparison."""
    return [
        Batch(
            mean=batch.mean[i : i + 1],
            std=batch.std[i : i + 1],
            geometry=batch.geometry[i : i + 1],
            conditioning=batch.conditioning[i : i + 1],
            preference=batch.preference[i : i + 1],
            weight=batch.weight[i : i + 1],
            ids=batch.ids[i : i + 1],
            draws=batch.draws[i : i + 1],
            positions=batch.positions[i : i + 1],
        )
        for batch in batches
        for i in range(len(batch))
    ]


def test_a_batch_holds_what_the_encoder_says(cache: LatentCache, votes: Path) -> None:
    """Mean, std and conditioning of every slot, computed again from the picture files."""
    family = TinyEncoder()
    dataset = PairDataset(cache, filled(cache, votes))
    comparisons = open_comparisons(votes)
    batches = list(sequential(dataset, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    for place, batch in enumerate(rows_of(batches)):
        comparison = comparisons[place]
        pixels = np.stack([fit(decode(image.read()), SIDE) for image in comparison.images])
        mean, std = family.encode_images(torch.from_numpy(pixels).float() / 255)
        torch.testing.assert_close(batch.mean[0], mean)
        torch.testing.assert_close(batch.std[0], std)
        expected = family.encode_prompts([comparison.prompt])
        assert torch.equal(batch.conditioning.tensors["embeds"], expected.tensors["embeds"])
        assert batch.conditioning.tensors["embeds"].dtype == torch.float16
        assert (batch.ids, batch.draws, batch.positions) == ((comparison.id,), (0,), (place,))
        assert float(batch.preference) == (0.5 if place == 2 else 1.0)
        assert float(batch.weight) == (3.0 if place == 2 else 1.0)


def test_the_same_picture_in_both_slots_gives_the_same_latents(cache: LatentCache, votes: Path) -> None:
    dataset = PairDataset(cache, filled(cache, votes, flips=(False, True)))
    for batch in rows_of(list(islice(PairStream(dataset, 0, batch_size=7), 20))):
        same = torch.equal(batch.mean[0, 0], batch.mean[0, 1])
        assert same == (batch.ids[0] == open_comparisons(votes)[3].id)


def test_every_picture_and_prompt_is_encoded_once(cache: LatentCache, votes: Path) -> None:
    family = TinyEncoder()
    first = filled(cache, votes, family, batch_size=4, flips=(False, True))
    assert (family.images, family.prompts) == (12, 4)
    assert family.sizes == {4}
    before = entries(cache.folder)
    assert len(before) == 12 + 4
    again = filled(cache, votes, family, batch_size=4, flips=(False, True))
    assert (family.images, family.prompts) == (12, 4)
    assert entries(cache.folder) == before
    np.testing.assert_array_equal(first.pictures, again.pictures)


def test_cached_pictures_are_not_decoded_again(cache: LatentCache, votes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(cache, votes)
    monkeypatch.setattr("flowalign.data.fill.decode", lambda data: pytest.fail("decoded"))
    assert len(filled(cache, votes)) == 7


def test_the_last_batch_is_padded(cache: LatentCache, votes: Path) -> None:
    family = TinyEncoder()
    filled(cache, votes, family, batch_size=5)
    assert family.sizes == {5}
    assert family.images == 6  # five, then one with four copies of itself
    assert len(list(cache.folder.glob("images-*/??/*.safetensors"))) == 6


def test_a_resumed_fill_equals_an_uninterrupted_one(tmp_path: Path, votes: Path) -> None:
    whole = LatentCache(tmp_path / "whole", "vae", "text", resolution=SIDE)
    filled(whole, votes)
    parts = LatentCache(tmp_path / "parts", "vae", "text", resolution=SIDE)
    comparisons = open_comparisons(votes)
    for indices in ([3, 5], [1], range(7)):
        fill(parts, comparisons, list(indices), TinyEncoder(), batch_size=4, progress=False, workers=1)
    assert entries(whole.folder) == entries(parts.folder)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import flowalign.data.cache as module
from pathlib import Path
import torch
cache = module.LatentCache(sys.argv[2], "vae", "text", resolution=16)
write = Path.write_bytes
def half(self, data):
    write(self, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = half
cache.write_image(cache.image_path(b"x" * 32, False), torch.zeros(4, 2, 2), torch.ones(4, 2, 2), range(6))
"""


def test_a_process_killed_while_writing_harms_nobody(tmp_path: Path, root: Path, votes: Path, cache: LatentCache) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(cache.folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not cache.image_path(b"x" * 32, False).exists()
    (leftover,) = cache.folder.rglob("*.tmp")
    assert leftover.stat().st_size > 0
    dataset = PairDataset(cache, filled(cache, votes))
    assert usage(cache.folder)["entries"] == 6 + 4
    assert len(list(sequential(dataset, 7))) == 1
    assert usage(cache.folder)["leftovers"] == {"entries": 0, "bytes": 0}  # a running process may be writing it
    clear(cache.folder)
    assert {path for path in cache.folder.rglob("*") if path.is_file()} == {leftover.parents[1] / "about.json", leftover}
    os.utime(leftover, (1e9, 1e9))
    assert usage(cache.folder)["leftovers"] == {"entries": 1, "bytes": leftover.stat().st_size}
    clear(cache.folder)
    assert not list(cache.folder.iterdir())


class Together:
    """One of several processes, played by a thread: all meet at a barrier and tell each other what they have."""

    def __init__(self, index: int, barrier: threading.Barrier, told: list[Any]) -> None:
        self.count, self.index, self._barrier, self._told = barrier.parties, index, barrier, told

    def gather(self, value: Any) -> list[Any]:
        self._told[self.index] = value
        self._barrier.wait(20)
        out = list(self._told)
        self._barrier.wait(20)
        return out

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor)).sum(0, dtype=tensor.dtype)


@pytest.mark.parametrize("form", ["files", "parquet"])
def test_processes_share_a_fill_and_encode_every_picture_once(tmp_path: Path, votes: Path, form: str) -> None:
    """One picture cannot be read, and only one of the processes knows; in Parquet, pictures go by blocks of rows."""
    (tmp_path / "2.png").write_bytes(picture(9)[:200])
    source = votes
    if form == "parquet":
        rows = [json.loads(line) for line in votes.read_text().splitlines()] * 40
        columns = {side: [(tmp_path / row[side]).read_bytes() for row in rows] for side in ("chosen", "rejected")}
        source = tmp_path / "votes.parquet"
        pq.write_table(pa.table({"prompt": [row["prompt"] for row in rows], **columns}), source)
    alone = LatentCache(tmp_path / "alone", "vae", "text", resolution=SIDE)
    expected = filled(alone, source, TinyEncoder())
    shared = LatentCache(tmp_path / "shared", "vae", "text", resolution=SIDE)
    families, barrier, told = [TinyEncoder() for _ in range(3)], threading.Barrier(3), [None] * 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: filled(shared, source, families[i], ranks=Together(i, barrier, told)), range(3)))
    for each in found:
        for field in dataclasses.fields(Cached):
            np.testing.assert_array_equal(getattr(each, field.name), getattr(expected, field.name))
    assert expected.bad
    extra = entries(shared.folder).keys() - entries(alone.folder).keys()
    assert entries(alone.folder).keys() <= entries(shared.folder).keys()
    assert len(extra) <= 1  # the prompt of the unusable rows, where another process has it
    assert sum(family.prompts for family in families) == 3 + len(extra)
    if form == "files":
        assert sum(family.images for family in families) == 5
        assert sum(family.images > 0 for family in families) >= 2  # the work is shared, by names and not by who is first


def test_the_room_a_cache_takes_is_said_first_and_must_be_there(
    cache: LatentCache, votes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four pictures and two prompts in, what the rest of the rows names is counted at the size of the first entry."""
    filled(cache, votes, batch_size=2, flips=(False, True), progress=True)
    said = capsys.readouterr().err
    size = next(iter(cache.folder.glob("images-*/??/*.safetensors"))).stat().st_size
    assert f"caching 12 more pictures takes about {amount(12 * size)}; {str(cache.folder)!r} has " in said
    assert "more prompts takes about" in said
    clear(cache.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=12 * size - 1))
    with pytest.raises(DataError, match=r"pictures takes about .* left; free some, .* data\.cache, .* data\.limit"):
        filled(cache, votes, batch_size=2, flips=(False, True))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**9))
    assert len(filled(cache, votes, batch_size=2, flips=(False, True))) == 7
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    assert len(filled(cache, votes, batch_size=2, flips=(False, True))) == 7  # nothing is left to write
    assert (amount(0), amount(1023), amount(3 * 2**29)) == ("0 bytes", "1023 bytes", "1.5 GiB")


def test_bad_pictures_are_skipped_and_named(tmp_path: Path, cache: LatentCache, votes: Path) -> None:
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    (tmp_path / "cut.png").write_bytes(picture(9)[:200])
    rows[1] |= {"chosen": "cut.png"}
    rows[4] |= {"rejected": "absent.png"}
    rows[5] |= {"prompt": ""}
    votes = write(tmp_path, rows)
    cached = filled(cache, votes)
    assert cached.indices.tolist() == [0, 2, 3, 6]
    assert [bad.row for bad in cached.bad] == [1, 4, 5]
    for bad, parts in zip(cached.bad, (("cut.png", "readable"), ("absent.png", "No such"), ("prompt",)), strict=True):
        assert all(part in bad.reason for part in (*parts, f"votes.jsonl:{bad.row + 1}"))
    assert [bad.row for bad in filled(cache, votes).bad] == [1, 4, 5]  # also when all else is cached
    with pytest.raises(DataError, match=r"votes.jsonl:2, picture cut.png"):
        filled(cache, votes, on_bad_row="error")
    with pytest.raises(DataError, match="on_bad_row is 'ignore'; allowed: error, skip"):
        filled(cache, votes, on_bad_row="ignore")
    with pytest.raises(DataError, match=r"none of the 1 comparisons.*cut.png"):
        fill(cache, open_comparisons(votes), [1], TinyEncoder(), progress=False)


def test_what_a_fill_refuses(tmp_path: Path, cache: LatentCache, votes: Path) -> None:
    class Broken(TinyEncoder):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = super().encode_images(pixels)
            return mean * torch.nan, std

    with pytest.raises(NonFiniteError, match="float32"):
        filled(cache, votes, Broken())
    assert not list(cache.folder.glob("images-*/??/*.safetensors"))
    with pytest.raises(ConfigError, match="multiple of 8"):
        filled(LatentCache(tmp_path / "c", "vae", "text", resolution=20), votes)
    row = {"prompt": "a", "chosen": ["0.png", "1.png"], "rejected": ["2.png", "3.png"]}
    rows = [*(json.loads(line) for line in votes.read_text().splitlines()), row]
    with pytest.raises(DataError, match=r"votes.jsonl:8: 4 pictures of which 2 chosen, but earlier rows have 2 and 1"):
        filled(cache, write(tmp_path, rows))
    groups = filled(cache, write(tmp_path, [row]))
    assert groups.num_chosen == 2
    assert next(sequential(PairDataset(cache, groups), 1)).mean.shape == (1, 4, 4, 2, 2)


def test_keys_tell_apart_all_that_changes_latents(tmp_path: Path) -> None:
    def path(
        images: str = "vae", resolution: int = 16, dtype: str = "float32", digest: bytes = b"a", flip: bool = False
    ) -> Path:
        return LatentCache(tmp_path, images, "text", resolution=resolution, dtype=dtype).image_path(digest, flip)

    paths = {path(), path("other"), path(resolution=32), path(dtype="float16"), path(digest=b"b"), path(flip=True)}
    assert len(paths) == 6
    assert len({each.name for each in paths}) == 6
    prompts = {LatentCache(tmp_path, "vae", text, resolution=16).prompt_path(p) for text in "st" for p in ("", "a", "b")}
    assert len(prompts) == 6


def test_storage_type_and_deterministic_encoders(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "vae", "text", resolution=16, dtype="bfloat16")
    mean, path = torch.randn(4, 2, 2), cache.image_path(b"a", False)
    cache.write_image(path, mean, torch.zeros(4, 2, 2), (1025, 1023, 3, 0, 1024, 1024))
    stored, std, geometry = cache.read_image(path).values()
    assert stored.dtype == torch.float32
    assert torch.equal(stored, mean.bfloat16().float())
    assert torch.equal(std, torch.zeros(4, 2, 2))
    assert geometry.tolist() == [1025, 1023, 3, 0, 1024, 1024]
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="missing or damaged"):
        cache.read_image(path)
    with pytest.raises(DataError, match="dtype is 'int8'; allowed"):
        LatentCache(tmp_path, "vae", "text", resolution=16, dtype="int8")


def test_usage_and_clear(tmp_path: Path, votes: Path) -> None:
    folder = tmp_path / "cache"
    for name in ("one", "a longer fingerprint, with signs"):
        filled(LatentCache(folder, f"{name} vae", f"{name} text", resolution=SIDE, checkpoint=name), votes)
    (folder / "mine.txt").write_text("not the cache's")
    report = usage(folder)
    assert report["entries"] == 2 * (6 + 4)
    assert report["bytes"] == sum(map(len, entries(folder).values()))
    images = [store for store in report["stores"] if store["kind"] == "images"]
    assert {store["fingerprint"] for store in images} == {"one vae", "a longer fingerprint, with signs vae"}
    assert {(store["resolution"], store["dtype"], store["entries"]) for store in images} == {(SIDE, "float32", 6)}
    with pytest.raises(DataError, match="did you mean 'one vae'"):
        clear(folder, "one vea")
    size = next(store["bytes"] for store in images if store["checkpoint"] == "one")
    assert clear(folder, "one vae") >= size
    assert usage(folder)["entries"] == 4 + 10
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    nothing = {"entries": 0, "bytes": 0}
    assert usage(tmp_path / "absent") == {**nothing, "stores": [], "indices": nothing, "leftovers": nothing}


STREAM = {"batch_size": 6, "caption_dropout": 0.3}


@pytest.fixture
def dataset(cache: LatentCache, votes: Path) -> PairDataset:
    return PairDataset(cache, filled(cache, votes, flips=(False, True)))


def take(dataset: PairDataset, comparisons: int, **options: Any) -> list[Batch]:
    options = STREAM | options
    share = options["batch_size"] // options.get("world_size", 1)
    return rows_of(list(islice(PairStream(dataset, 5, **options), comparisons // share)))


def test_the_stream_does_not_depend_on_batch_size_ranks_workers_or_start(cache: LatentCache, dataset: PairDataset) -> None:
    whole = take(dataset, 24)
    assert [row.positions[0] for row in whole] == list(range(24))
    ranks = [take(dataset, 12, rank=rank, world_size=2) for rank in (0, 1)]
    lazy = PairDataset(cache, dataset.cached, memory=0)
    assert (dataset.in_memory, lazy.in_memory) == (True, False)
    for other in (
        take(dataset, 24, batch_size=1),
        take(dataset, 24, batch_size=8),
        [row for step in range(4) for rank in ranks for row in rank[3 * step : 3 * step + 3]],
        whole[:10] + take(dataset, 14, batch_size=2, position=10),
        take(dataset, 24, workers=1),
        take(dataset, 24, batch_size=2, workers=2),
        take(lazy, 24, workers=2),
        take(lazy, 24),
    ):
        for left, right in zip(whole, other, strict=True):
            assert_same(left, right)


def test_every_epoch_visits_every_comparison_once_in_another_order(dataset: PairDataset) -> None:
    epochs = [take(dataset, 28, batch_size=7)[start : start + 7] for start in range(0, 28, 7)]
    orders = [[row.ids[0] for row in epoch] for epoch in epochs]
    assert all(sorted(order) == sorted(dataset.cached.ids) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [row.draws[0] for epoch in epochs for row in epoch] == [epoch for epoch in range(4) for _ in range(7)]


def test_flips_are_shared_by_the_pair_and_dropped_captions_are_the_empty_prompt(dataset: PairDataset) -> None:
    upright = {row.ids[0]: row for row in rows_of(list(sequential(dataset, 7)))}
    mirrored = {}
    for place, key in enumerate(dataset.cached.ids.tolist()):
        comparison = open_comparisons(dataset._cache.folder.parent / "votes.jsonl")[place]
        pixels = np.stack([fit(decode(image.read()), SIDE, flip=True) for image in comparison.images])
        mirrored[key] = TinyEncoder().encode_images(torch.from_numpy(pixels).float() / 255)[0]
    empty = TinyEncoder().encode_prompts([""]).tensors["embeds"]
    flips = drops = 0
    rows = take(dataset, 420)
    for row in rows:
        key = row.ids[0]
        flip = not torch.equal(row.mean, upright[key].mean)
        if flip:
            torch.testing.assert_close(row.mean[0], mirrored[key])
        drop = not torch.equal(row.conditioning.tensors["embeds"], upright[key].conditioning.tensors["embeds"])
        if drop:
            assert torch.equal(row.conditioning.tensors["embeds"], empty)
        flips, drops = flips + flip, drops + drop
    assert 0.4 < flips / len(rows) < 0.6
    assert 0.22 < drops / len(rows) < 0.38


def test_a_stream_leaves_the_global_generator_alone(dataset: PairDataset) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(dataset, 6)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch_size is 5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"position": -1}, "position is -1"),
    ],
)
def test_streams_that_cannot_be(dataset: PairDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PairStream(dataset, 0, **STREAM | options)


def test_audit(tmp_path: Path) -> None:
    def row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more

    rows = [
        row("p", "a", "b"),
        row("p", "a", "b"),  # a duplicate
        row("p", "b", "a"),  # a contradiction; a and b are now in both roles
        row("q", "c", "d"),
        row("q", "e", "c", preference=0.5),  # a tie gives no roles: c stays chosen only
        row("r", "f", "f"),  # the same picture, in both roles
        row("", "a", "b"),
    ]
    comparisons = open_comparisons(write(tmp_path, rows))
    assert audit(comparisons) == {
        "comparisons": 6,
        "bad_rows": 1,
        "ties": 1,
        "prompts": 3,
        "largest_prompt_share": 0.5,
        "pictures": 6,
        "pictures_per_comparison": {2: 6},
        "pictures_in_both_roles": 3,
        "same_picture": 1,
        "duplicates": 1,
        "contradictions": 1,
    }
    assert audit(comparisons, [3])["comparisons"] == 1


def test_the_bundled_comparisons_have_no_surprises(emoji: Path) -> None:
    counts = audit(open_comparisons(emoji / "preferences" / "fluent_over_noto-held_out.jsonl"))
    assert counts["pictures"] == 2 * counts["comparisons"] > 0
    assert not any(counts[name] for name in ("bad_rows", "ties", "pictures_in_both_roles", "same_picture", "contradictions"))


class Named(TinyEncoder):
    """An encoder as `load_data` wants it."""

    resolution = SIDE

    def fingerprint(self, part: str) -> str:
        return f"named {part}"

    def release_encoders(self) -> None: ...


def loaded(
    source: Path, folder: Path, family: Named, *overrides: str
) -> tuple[PairDataset, PairDataset | None, dict[str, Any]]:
    data = {"train": str(source), "held_out": 0.3, "cache": str(folder / "cache")}
    tree = {"model": {"checkpoint": "none"}, "data": data}
    ranks = Ranks(SimpleNamespace(num_processes=1, process_index=0), 60.0)  # type: ignore[arg-type]
    return load_data(parse(tree, "test", overrides), family, folder, False, ranks)  # type: ignore[arg-type]


def test_a_second_start_reads_no_row_of_a_table(tmp_path: Path, votes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    rows.append(rows[0] | {"prompt": ""})
    columns = {side: [(tmp_path / row[side]).read_bytes() for row in rows] for side in ("chosen", "rejected")}
    table = tmp_path / "votes.parquet"
    pq.write_table(pa.table({"prompt": [row["prompt"] for row in rows], **columns}), table)
    family = Named()
    first = loaded(table, tmp_path, family)
    asked = family.images, family.prompts
    with monkeypatch.context() as patch:
        patch.setattr("flowalign.sources.open_comparisons", lambda *_, **__: pytest.fail("opened"))
        second = loaded(table, tmp_path, family)
    assert (family.images, family.prompts) == asked
    assert json.loads(json.dumps(first[2])) == json.loads(json.dumps(second[2]))
    assert first[2]["bad_rows"] == 1
    for one, other in zip(first[:2], second[:2], strict=True):
        for left, right in zip(sequential(one, 3), sequential(other, 3), strict=True):
            assert_same(left, right)
        for field in {field.name for field in dataclasses.fields(Cached)} - {"among"}:
            np.testing.assert_array_equal(getattr(one.cached, field), getattr(other.cached, field))
        assert one.cached.about == other.cached.about
    # Whatever the index depends on: settings, the encoders' entries, the file.
    opened: list[str] = []
    read = open_comparisons

    def counted(source: str, **more: Any) -> Any:
        opened.append(source)
        return read(source, **more)

    monkeypatch.setattr("flowalign.sources.open_comparisons", counted)
    loaded(table, tmp_path, family, "train.seed=1")
    loaded(table, tmp_path, family, "data.tie_policy=drop")
    assert len(opened) == 2
    next(iter((tmp_path / "cache").glob("images-*/??/*.safetensors"))).unlink()
    loaded(table, tmp_path, family)
    assert len(opened) == 3
    assert family.images == asked[0] + 1
    loaded(table, tmp_path, family)
    assert len(opened) == 3
    pq.write_table(pa.table({"prompt": ["z"] * 2, "chosen": [picture(7)] * 2, "rejected": [picture(8)] * 2}), table)
    assert len(loaded(table, tmp_path, family)[0]) == 2
    assert len(opened) == 4
    clear(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_pictures_that_lie_beside_a_source_are_read_at_every_start(tmp_path: Path, votes: Path) -> None:
    """Another picture under the same name is another picture."""
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    table = tmp_path / "paths.parquet"
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}), table)
    for number, source in enumerate((votes, table), 1):
        family = Named()
        before = loaded(source, tmp_path / source.stem, family)[0]
        for seed in range(6):
            (tmp_path / f"{seed}.png").write_bytes(picture(100 * number + seed))
        after = loaded(source, tmp_path / source.stem, family)[0]
        assert not np.array_equal(before.cached.pictures, after.cached.pictures)
