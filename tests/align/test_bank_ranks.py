"""A bank that several processes fill, that is killed in the middle, and that others go on with, is that of one process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from flowalign.align import bank
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch
from flowalign.device import make_accelerator
from flowalign.settings import Config
from flowalign.setup import prepare
from tests.train.test_resume import forks, free_port

Make = Callable[..., Config]
DRIFT = "objective.name=dspo"
BATCHES = 2 * 6 + 6  # twelve comparisons at two draws, two at a time, and the same twelve held out, at one

pytestmark = pytest.mark.usefixtures("one_thread")


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("bank-*/*.safetensors")}


def listed(folder: Path, name: str) -> list[list[str]]:
    """What each of two processes computed."""
    return [(folder / f"run-{name}-{index}.txt").read_text().splitlines() for index in (0, 1)]


class Killed(Exception):
    pass


def alone(settings: Make, folder: Path, name: str, patch: pytest.MonkeyPatch, dies: int | None = None) -> list[str]:
    """What one process computes until it has computed `dies` batches."""
    found: list[str] = []
    own = PreferenceStep.for_bank

    def computed(self: PreferenceStep, batch: Batch, rng: object) -> object:
        if len(found) == dies:
            raise Killed
        found.append(f"{len(batch.positions)} {batch.draws[0]} {batch.positions[0]}")
        return own(self, batch, rng)  # type: ignore[arg-type]

    with patch.context() as within:
        within.setattr(bank, "PART", 4)
        within.setattr(PreferenceStep, "for_bank", computed)
        config = banked(settings, folder, name)
        prepare(config, make_accelerator(config, Path(config.output)), progress=False)
    return found


def banked(settings: Make, folder: Path, name: str = "") -> Config:
    return settings(folder / f"run{name}", DRIFT, "reference.bank=2", f"data.cache={folder / 'cache'}{name}")


def test_processes_fill_a_bank_together(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = alone(settings, tmp_path, "-one", monkeypatch)
    whole = files(tmp_path / "cache-one")
    assert len(every) == BATCHES
    assert len(whole) == BATCHES // 2
    for name in ("fill", "fill_lost", "fill_rest"):
        shutil.copytree(tmp_path / "cache-one", tmp_path / f"cache-{name}", ignore=shutil.ignore_patterns("bank-*"))
    with pytest.raises(Killed):
        alone(settings, tmp_path, "-fill_rest", monkeypatch, dies=7)  # three parts of two, and one batch of the fourth
    left = files(tmp_path / "cache-fill_rest")
    assert len(left) == 3
    assert left.items() < whole.items()

    codes, said = forks("fill,fill_lost,fill_rest", banked(settings, tmp_path), tmp_path, 2, free_port())
    assert codes == {"fill": 0, "fill_lost": 1, "fill_rest": 0}, said

    shares = listed(tmp_path, "fill")
    assert [len(share) for share in shares] == [6 + 4, 6 + 2]  # of six parts and three
    assert sorted(chain(*shares)) == sorted(every)
    assert files(tmp_path / "cache-fill") == whole

    assert sorted(chain(*listed(tmp_path, "fill_rest"))) == sorted(every[6:])
    assert files(tmp_path / "cache-fill_rest") == whole

    assert re.search("PeerError: another process of this run ended or stopped answering", said)
    left = files(tmp_path / "cache-fill_lost")
    assert left.items() < whole.items()
    assert len(left) == 3  # a part of each, and the next of the one that was not killed
    assert alone(settings, tmp_path, "-fill_lost", monkeypatch) == every[6:]
    assert files(tmp_path / "cache-fill_lost") == whole
