"""Ray gives the table that the local engine gives, also where a worker is killed on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import Scorer, score
from flowalign.scoring.ray_engine import score_on_ray
from flowalign.scoring.sources import open_items
from flowalign.scoring.table import read_table
from tests.scoring.pixels import Brightness, Lettered, Means, folder_of

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
COUNT = 96


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    root = str(Path(__file__).resolve().parents[2])
    more = {"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20, runtime_env=more)
    yield
    ray.shutdown()


class Killed(Means):
    """The first worker that comes this far kills itself, once."""

    def __init__(self, mark: Path | None) -> None:
        super().__init__()
        self.mark = mark

    def see(self, inputs: Sequence[Tensor]) -> Tensor:
        time.sleep(0.02)
        if self.mark is not None and len(self.seen) >= 8 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().see(inputs)


def opened(source: str, cache: str, mark: str | None) -> tuple[Any, Scorer]:
    tower = Killed(None if mark is None else Path(mark))
    return open_items(source), Scorer([Brightness(tower), Lettered(tower)], ScoreCache(Path(cache)), batch_size=4)


@pytest.mark.parametrize("killed", [False, True])
def test_two_workers_give_the_local_table(tmp_path: Path, cluster: None, killed: bool) -> None:
    source = folder_of(tmp_path / "p", COUNT)
    (source / "0007.png").write_bytes(b"no picture")
    items, scorer = opened(str(source), str(tmp_path / "local"), None)
    wanted = score(items, scorer, tmp_path / "local.parquet", progress=False)
    mark, cache = str(tmp_path / "killed") if killed else None, str(tmp_path / "shared")
    place = str(source)
    cards = {reward.card.name: reward.card for reward in scorer.rewards}
    counts = score_on_ray(lambda: opened(place, cache, mark), cards, COUNT, tmp_path / "ray.parquet", block=12, progress=False)
    local, remote = read_table(tmp_path / "local.parquet"), read_table(tmp_path / "ray.parquet")
    assert remote.data.to_pylist() == local.data.to_pylist()
    assert (counts.rows, counts.scored, counts.failed) == (wanted.rows, wanted.scored, wanted.failed) == (COUNT, COUNT - 1, 1)
    assert (tmp_path / "killed").exists() is killed
    assert counts.forwards + counts.cached // 2 == COUNT - 1  # what was scored before the kill is known
