"""What lies in a cache folder beside pictures and prompts is listed, told apart, and cleared alone or with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flowalign import runs
from flowalign.data.cache import LatentCache, clear, describe, usage
from flowalign.errors import DataError


def aged(path: Path, days: float = 1.1) -> Path:
    """The same file, last written so long ago."""
    then = path.stat().st_mtime - days * 24 * 3600
    os.utime(path, (then, then))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A cache with pictures and prompts, a bank that says what it is and one that does not, an index and leftovers."""
    folder = tmp_path / "cache"
    cache, latents = LatentCache(folder, "vae", "text", resolution=16, checkpoint="tiny"), torch.ones(4, 2, 2)
    cache.write_image(cache.image_path(b"a" * 32, flip=False), latents, latents, (16, 16, 0, 0, 16, 16))
    cache.write_prompt(cache.prompt_path("a"), {"embeds": latents})
    for digit in "ab":
        bank = folder / f"bank-{digit * 20}"
        bank.mkdir()
        for draw in range(2):
            (bank / f"draw-{draw:05d}-000000.safetensors").write_bytes(bytes(100))
        (bank / ".draw-00002-000000.safetensors.young.tmp").write_bytes(bytes(10))
        (bank / ".draw-00002-000000.safetensors.aged.tmp").write_bytes(bytes(10))
        aged(bank / ".draw-00002-000000.safetensors.aged.tmp")
    describe(
        folder / f"bank-{'a' * 20}", {"denoiser": "unet", "checkpoint": "tiny", "pairs": 7, "draws": 2, "precision": "bf16"}
    )
    (folder / "rows-0.safetensors").write_bytes(bytes(1000))
    for name in (".rows-0.safetensors.aged.tmp", ".mine.aged.tmp"):
        (folder / name).write_bytes(bytes(5))
        aged(folder / name)
    return folder


def test_banks_indices_and_leftovers_are_listed(mixed: Path) -> None:
    report = usage(mixed)
    told, bare, *others = report["stores"]
    own = {
        "store": f"bank-{'a' * 20}",
        "kind": "bank",
        "fingerprint": "a" * 20,
        "entries": 2,
        "bytes": 200,
        "checkpoint": "tiny",
    }
    assert {name: told[name] for name in own} == own
    assert (told["denoiser"], told["pairs"], told["draws"], told["precision"]) == ("unet", 7, 2, "bf16")
    assert (bare["kind"], bare["fingerprint"], bare["entries"], bare["checkpoint"]) == ("bank", "b" * 20, 2, "")
    assert report["indices"] == {"entries": 1, "bytes": 1000}
    assert report["leftovers"] == {"entries": 3, "bytes": 25}
    assert report["bytes"] == 400 + 1000 + 25 + sum(store["bytes"] for store in others)
    lines = runs.cache_list(mixed)["summary"].splitlines()
    today = told["used"][:10]
    assert lines[0] == f"bank-{'a' * 20}: 2 entries, 0.0 MiB, used {today}, tiny, 7 pairs at 2 draws, bf16"
    assert lines[1] == f"bank-{'b' * 20}: 2 entries, 0.0 MiB, used {today}"
    assert lines[-3:-1] == ["indices: 1 entries, 0.0 MiB", "leftovers: 3 entries, 0.0 MiB"]


@pytest.mark.parametrize(
    ("restriction", "left", "index"),
    [
        ({}, [], False),
        ({"kind": "bank"}, ["images", "prompts"], True),
        ({"kind": "images"}, ["bank", "bank", "prompts"], False),
        ({"kind": "prompts"}, ["bank", "bank", "images"], False),
        ({"fingerprint": "a" * 20}, ["bank", "images", "prompts"], True),
        ({"fingerprint": "unet"}, ["bank", "images", "prompts"], True),
        ({"fingerprint": f"bank-{'b' * 20}", "kind": "bank"}, ["bank", "images", "prompts"], True),
        ({"fingerprint": "text"}, ["bank", "bank", "images"], False),
    ],
)
def test_a_kind_or_a_bank_is_cleared_alone(mixed: Path, restriction: dict[str, str], left: list[str], index: bool) -> None:
    young = list(mixed.glob("bank-*/*.young.tmp"))
    report = usage(mixed)
    freed = clear(mixed, **restriction)
    assert freed >= report["bytes"] - usage(mixed)["bytes"] > 0
    assert all(path.exists() for path in young)
    assert [store["kind"] for store in usage(mixed)["stores"] if store["entries"]] == left
    assert (mixed / "rows-0.safetensors").exists() is index
    assert usage(mixed)["leftovers"]["entries"] == 0
    assert (mixed / ".mine.aged.tmp").exists()
    for path in young:
        aged(path)
    clear(mixed)
    assert [path.name for path in mixed.iterdir()] == [".mine.aged.tmp"]


def test_clearing_what_is_not_there_says_what_is(mixed: Path) -> None:
    with pytest.raises(DataError, match="holds no prompts of 'unet'; allowed: prompts-text, text"):
        clear(mixed, "unet", "prompts")
    with pytest.raises(DataError, match="no kind 'banks'; did you mean 'bank'"):
        clear(mixed, kind="banks")
    clear(mixed, kind="prompts")
    with pytest.raises(DataError, match="holds no prompts of 'text'; flowalign cache lists what it holds"):
        clear(mixed, "text", "prompts")


def test_a_store_was_used_when_it_was_last_opened(mixed: Path) -> None:
    for path in mixed.rglob("*"):
        aged(path, days=40)
    before = {store["kind"]: store["used"] for store in usage(mixed)["stores"]}
    LatentCache(mixed, "vae", "another", resolution=16)
    after = {store["kind"]: store["used"] for store in usage(mixed)["stores"] if store["fingerprint"] != "another"}
    assert {kind for kind in after if after[kind] > before[kind]} == {"images"}
