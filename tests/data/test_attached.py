"""Masks and noise that rows attach to their pictures: from each container to the batch, and what does not fit."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached
from flowalign.data.fill import fill
from flowalign.data.index import read_index, write_index
from flowalign.data.pairs import PairDataset, PairStream, sequential
from flowalign.data.readers import open_comparisons
from flowalign.data.records import Comparison, InlineImage, key63
from flowalign.errors import DataError
from tests.data.test_pipeline import TinyEncoder, Together, picture, write

SIDE = 16
"""Of pictures; their latents are 4 x 2 x 2."""
LEFT = [[2.0, 0.0], [2.0, 0.0]]
RIGHT = [[0.0, 2.0], [0.0, 2.0]]
ALL = [[1.0, 1.0], [1.0, 1.0]]


def half(width: int = SIDE, height: int = SIDE, white: slice = slice(0, SIDE // 2)) -> bytes:
    """A mask that is white in some columns."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, white] = 255
    return png(pixels)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def npy(values: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of 16 x 16, a wide one, and masks."""
    files = {"0.png": picture(0, SIDE, SIDE), "1.png": picture(1, SIDE, SIDE), "wide.png": picture(2, 2 * SIDE, SIDE)}
    files |= {"left.png": half(), "small.png": half(8, 8, slice(0, 4)), "white.png": half(white=slice(None))}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


PAIR = {"prompt": "a cat", "chosen": "0.png", "rejected": "1.png"}


def filled(source: Path, wanted: Sequence[str], flips: tuple[bool, ...] = (False,), **options: Any) -> PairDataset:
    cache = LatentCache(source.parent / "cache", "vae", "text", resolution=SIDE)
    comparisons = open_comparisons(source, **options)
    cached = fill(cache, comparisons, range(len(comparisons)), TinyEncoder(), flips=flips, attached=wanted, progress=False)
    return PairDataset(cache, cached)


def only(dataset: PairDataset, name: str) -> Tensor:
    (batch,) = sequential(dataset, len(dataset))
    return getattr(batch, name)


def bad(folder: Path, row: dict[str, Any], wanted: str) -> str:
    with pytest.raises(DataError) as caught:
        filled(write(folder, [row]), [wanted])
    return str(caught.value)


def test_masks_are_cut_averaged_and_brought_to_mean_1(folder: Path) -> None:
    grey = np.zeros((SIDE, SIDE), np.uint8)
    grey[:8, :8], grey[:8, 8:], grey[8:, 12:] = 102, 51, 204  # the last quarter is half covered
    (folder / "grey.png").write_bytes(png(grey))
    (folder / "wide-left.png").write_bytes(half(2 * SIDE, SIDE, slice(0, SIDE)))  # the left half of the centre square
    rows = [
        PAIR | {"mask": "left.png"},
        PAIR | {"mask": ["small.png", "white.png"]},
        PAIR | {"chosen_mask": "grey.png", "rejected_mask": "left.png"},
        PAIR | {"chosen": "wide.png", "chosen_mask": "wide-left.png", "rejected_mask": "white.png"},
        PAIR,
    ]
    found = only(filled(write(folder, rows), ["mask"]), "mask")
    share = np.array([[0.4, 0.2], [0.0, 0.4]])
    assert found.shape == (5, 2, 2, 2)
    expected = [[LEFT, LEFT], [LEFT, ALL], [(share / share.mean()).tolist(), LEFT], [LEFT, ALL], [ALL, ALL]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert (found[1, 1] == 1).all()  # white is exactly 1
    assert (found[4] == 1).all()


def test_a_mirrored_picture_has_a_mirrored_mask_and_no_other(folder: Path) -> None:
    dataset = filled(write(folder, [PAIR | {"mask": "left.png"}, PAIR]), ["mask"], flips=(False, True))
    seen = set()
    for batch in islice(PairStream(dataset, 0, batch_size=2), 8):
        for row, example in enumerate(batch.ids):
            upright = torch.equal(batch.mean[row, 0], dataset._latents(int(dataset._picture[0, 0]), False)["mean"])
            masked = example == int(dataset.cached.ids[0])
            assert batch.mask is not None
            assert batch.mask[row].tolist() == [(LEFT if upright else RIGHT) if masked else ALL] * 2
            seen.add((upright, masked))
    assert len(seen) == 4


def test_masks_are_nothing_unless_they_are_asked_for(folder: Path) -> None:
    """They may even be missing; and a picture with a mask is another entry than the picture alone."""
    assert only(filled(write(folder, [PAIR | {"mask": "absent.png"}]), []), "mask") is None
    path = write(folder, [PAIR | {"mask": "left.png"}])
    plain, masked = filled(path, []), filled(path, ["mask"])
    assert (plain.cached.attached, masked.cached.attached) == ((), ("mask",))
    assert not (plain.cached.pictures == masked.cached.pictures).all(-1).any()
    assert torch.equal(only(plain, "mean"), only(masked, "mean"))
    assert only(filled(write(folder, [PAIR]), ["mask"]), "mask") is None  # asked for, and no row has one


def test_what_is_not_in_memory_is_read_the_same(folder: Path) -> None:
    dataset = filled(write(folder, [PAIR | {"mask": "left.png", "seed": 3}, PAIR | {"seed": [4, 5]}]), ["mask", "noise"])
    read = PairDataset(dataset._cache, dataset.cached, memory=0)
    assert dataset.in_memory
    assert not read.in_memory
    for name in ("mean", "std", "geometry", "mask", "noise"):
        assert torch.equal(only(dataset, name), only(read, name))


def containers() -> dict[str, Callable[[Path], Path]]:
    def folder_of_files(at: Path) -> Path:
        names = {"chosen": "0.png", "rejected": "1.png", "chosen_mask": "left.png", "rejected_mask": "white.png"}
        line = {"prompt": "a"} | {f"{name}_file_name": file for name, file in names.items()}
        (at / "metadata.jsonl").write_text(json.dumps(line | {"noise": ["a.npy", "b.safetensors"]}))
        return at

    def parquet(at: Path) -> Path:
        columns = {"chosen": "0.png", "rejected": "1.png", "chosen_mask": "left.png", "rejected_mask": "white.png"}
        columns |= {"chosen_noise": "a.npy", "rejected_noise": "b.safetensors"}
        table = pa.table({"prompt": ["a"], **{name: [(at / file).read_bytes()] for name, file in columns.items()}})
        pq.write_table(table, at / "votes.parquet")
        return at / "votes.parquet"

    def lists_of_bytes(at: Path) -> Path:
        columns = {"images": ("0.png", "1.png"), "mask": ("left.png", "white.png"), "noise": ("a.npy", "b.safetensors")}
        table = {name: [[(at / file).read_bytes() for file in files]] for name, files in columns.items()}
        pq.write_table(pa.table({"prompt": ["a"], **table}), at / "lists.parquet")
        return at / "lists.parquet"

    def shards(at: Path) -> Path:
        members = {"chosen.png": "0.png", "rejected.png": "1.png", "chosen_mask.png": "left.png"}
        members |= {
            "rejected_mask.png": "white.png",
            "chosen_noise.npy": "a.npy",
            "rejected_noise.safetensors": "b.safetensors",
        }
        with tarfile.open(at / "votes.tar", "w") as tar:
            for suffix, data in {"txt": b"a", **{name: (at / file).read_bytes() for name, file in members.items()}}.items():
                info = tarfile.TarInfo(f"0001.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return at / "votes.tar"

    return {each.__name__: each for each in (folder_of_files, parquet, lists_of_bytes, shards)}


@pytest.mark.parametrize("container", containers())
def test_every_container_can_hold_them(folder: Path, container: str) -> None:
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(9))
    (folder / "a.npy").write_bytes(npy(noise[0].double().numpy()))
    (folder / "b.safetensors").write_bytes(save({"noise": noise[1:].clone(), "other": noise}))
    dataset = filled(containers()[container](folder), ["mask", "noise"])
    assert only(dataset, "mask").tolist() == [[LEFT, ALL]]
    assert torch.equal(only(dataset, "noise")[0], noise)


def test_columns_for_a_side_can_be_named_and_both_sides_are_needed(folder: Path) -> None:
    row = PAIR | {"where": "left.png", "where_not": "white.png"}
    names = {"chosen_mask": "where", "rejected_mask": "where_not"}
    assert only(filled(write(folder, [row]), ["mask"], columns=names), "mask").tolist() == [[LEFT, ALL]]
    assert "'rejected_mask' is missing or null" in bad(folder, PAIR | {"chosen_mask": "left.png"}, "mask")
    assert "mask has 3 entries for 2 pictures" in bad(folder, PAIR | {"mask": ["left.png"] * 3}, "mask")
    lists = {"prompt": "a", "chosen": ["0.png", "1.png"], "rejected": ["1.png", "0.png"]}
    seeds = open_comparisons(write(folder, [lists | {"chosen_seed": [1, 2], "rejected_seed": [3, 4]}]))[0].seed
    assert seeds == (1, 2, 3, 4)


def test_noise_of_a_seed_is_what_torch_draws_from_it(folder: Path) -> None:
    rows = [PAIR | {"chosen_seed": 11, "rejected_seed": 12}, PAIR | {"seed": 11}, PAIR | {"seed": 5, "noise": "own.npy"}]
    own = np.full((4, 2, 2), 0.25, np.float16)
    (folder / "own.npy").write_bytes(npy(own))
    found = only(filled(write(folder, rows), ["noise"]), "noise")
    eleven, twelve = (torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (11, 12))
    assert torch.equal(found[0], torch.stack([eleven, twelve]))
    assert torch.equal(found[1], torch.stack([eleven, eleven]))
    assert (found[2] == 0.25).all()  # the file says more than the seed


def test_what_is_attached_and_does_not_fit_is_a_bad_row(folder: Path) -> None:
    noise = {"shape": npy(np.zeros((4, 4, 4))), "nan": npy(np.full((4, 2, 2), np.nan)), "text": b"hello", "empty": b""}
    noise |= {"objects": npy(np.array([{}], dtype=object)), "two": save({"a": torch.zeros(1), "b": torch.zeros(1)})}
    for name, data in noise.items():
        (folder / f"{name}.npy").write_bytes(data)
    (folder / "black.png").write_bytes(half(white=slice(0, 0)))
    (folder / "outside.png").write_bytes(half(2 * SIDE, SIDE, slice(0, 8)))
    wide = PAIR | {"chosen": "wide.png"}
    cases = [
        (PAIR | {"mask": "black.png"}, "mask", "picture 0.png: its mask is black where the picture is used"),
        (wide | {"mask": "outside.png"}, "mask", "picture wide.png: its mask is black where"),
        (wide | {"mask": "left.png"}, "mask", "its mask is 16x16 and the picture 32x16; both must have the same shape"),
        (PAIR | {"mask": "absent.png"}, "mask", "No such file"),
        (PAIR | {"mask": 0.5}, "mask", "a picture is 0.5"),
        (PAIR, "noise", "picture 0.png: it has neither noise nor a seed, on which switches.noise 'stored' trains"),
        (wide | {"seed": 1}, "noise", "it has 32x16 pixels and is used at 16x16"),
        (PAIR | {"seed": -1}, "noise", "its seed is -1; noise comes from seeds of 0"),
        (PAIR | {"noise": "shape.npy"}, "noise", "its noise has the shape (4, 4, 4) and its latents (4, 2, 2)"),
        (PAIR | {"noise": "nan.npy"}, "noise", "its noise holds NaN or infinity"),
        *((PAIR | {"noise": f"{name}.npy"}, "noise", "its noise is no .npy file") for name in ("text", "objects", "two")),
        (PAIR | {"noise": "empty.npy"}, "noise", "its noise is no .npy file"),
    ]
    for row, wanted, said in cases:
        message = bad(folder, row, wanted)
        assert said in message
        assert "\n" not in message


@pytest.mark.parametrize("masks", [["black.png"], ["black.png", "left.png", "left.png"]])
def test_processes_agree_on_what_is_attached(folder: Path, masks: list[str]) -> None:
    """Only one of them finds out that the first mask is black, and that its row cannot be used."""
    (folder / "black.png").write_bytes(half(white=slice(0, 0)))
    rows: list[dict[str, Any]] = []
    for place in range(6):
        (folder / f"own-{place}.png").write_bytes(picture(10 + place, SIDE, SIDE))
        mask = {"mask": masks[place]} if place < len(masks) else {}
        rows.append(PAIR | {"chosen": f"own-{place}.png", "seed": place} | mask)
    comparisons, cache = open_comparisons(write(folder, rows)), LatentCache(folder / "cache", "vae", "text", resolution=SIDE)
    barrier, told = threading.Barrier(3), [None] * 3

    def run(index: int) -> Cached:
        ranks = Together(index, barrier, told)
        return fill(cache, comparisons, range(6), TinyEncoder(), attached=("noise", "mask"), ranks=ranks, progress=False)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    for each in found:
        assert each.attached == (("mask", "noise") if len(masks) > 1 else ("noise",))
        assert each.indices.tolist() == [1, 2, 3, 4, 5]
        assert (each.pictures == found[0].pictures).all()


def test_an_index_remembers_what_is_attached(folder: Path) -> None:
    dataset = filled(write(folder, [PAIR | {"mask": "left.png", "seed": 1}]), ["noise", "mask"])
    write_index(folder / "index", {"train": dataset.cached}, {})
    found = read_index(folder / "index")
    assert found is not None
    again: Cached = found.parts["train"]
    assert again.attached == dataset.cached.attached == ("mask", "noise")
    assert (again.pictures == dataset.cached.pictures).all()


def test_masks_tell_comparisons_apart_and_nothing_else_changed_their_ids() -> None:
    a, b, m, n = (InlineImage(name, b"") for name in "abmn")
    assert Comparison("a cat", (a, b), seed=(1, 2), noise=(m, n)).id == key63("a cat", "a", "b")
    assert len({Comparison("a cat", (a, b), mask=mask).id for mask in (None, (m, n), (n, m))}) == 3
