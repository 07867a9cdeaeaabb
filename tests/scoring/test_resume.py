"""A run of a real tower that ends at any moment and is started again gives the table of a run left alone, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.scoring.cache import Name, ScoreCache
from flowalign.scoring.engine import STRETCH, Scorer, score
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Backbone, Card, Reward, Shelf
from flowalign.scoring.sources import open_items
from flowalign.scoring.table import ScoreTable, read_table
from tests.scoring.pixels import Brightness, Means, card, encoded

ROOT = Path(__file__).resolve().parents[2]
COUNT, BATCH = 22, 6


class Counted(Backbone):
    """Another backbone, that counts pictures."""

    def __init__(self, inner: Backbone) -> None:
        self.inner, self.key, self.device = inner, inner.key, inner.device
        self.batches: list[int] = []

    def prepare(self, image: Image.Image) -> Any:
        return self.inner.prepare(image)

    def forget(self) -> None:
        self.inner.forget()

    def see(self, inputs: Sequence[Any]) -> Any:
        self.batches.append(len(inputs))
        return self.inner.see(inputs)


class Picky(Reward):
    """Another reward, that fails for some prompts."""

    def __init__(self, inner: Reward, backbone: Backbone) -> None:
        self.inner, self.backbone, self.card = inner, backbone, card("picky", reads_prompt=True)

    def judge(self, features: Any, prompts: Sequence[str]) -> Tensor:
        if any("broken" in prompt for prompt in prompts):
            raise ValueError("it does not read that")
        return self.inner.judge(features, prompts)


class Plain(Picky):
    def __init__(self, inner: Reward, backbone: Backbone) -> None:
        self.inner, self.backbone, self.card = inner, backbone, inner.card

    def judge(self, features: Any, prompts: Sequence[str]) -> Tensor:
        return self.inner.judge(features, prompts)


class Stop(BaseException):
    """What ends a run on the spot, as a kill does."""


class Stopping(ScoreCache):
    """Ends the run at its n-th write: what was written before is in the file, all else is lost."""

    def __init__(self, folder: Path, writes: int) -> None:
        super().__init__(folder)
        self.left = writes

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop

    def add(self, given: Sequence[tuple[Card, Any]]) -> list[dict[Name, float]]:
        self._count()
        return super().add(given)

    def set_apart(self, cards: Iterable[Card], names: Iterable[Name]) -> None:
        self._count()
        super().set_apart(cards, names)


@pytest.fixture(scope="module")
def loaded() -> list[Reward]:
    return load_rewards([str(ROOT / "samples" / "emoji" / "rewards.yaml")], Shelf(torch.device("cpu")))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Pictures with prompts that come again, two of which fail; a picture that comes twice, and one that is damaged."""
    folder, draw = tmp_path / "p", np.random.default_rng(0)
    folder.mkdir()
    for number in range(COUNT):
        picture = Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        (folder / f"{number:03d}.png").write_bytes(encoded(picture))
        prompt = f"a broken thing {number}" if number in (5, 19) else f"thing {number // 3} of {'many ' * (number % 4)}"
        (folder / f"{number:03d}.txt").write_text(prompt)
    for ending in ("png", "txt"):
        (folder / f"014.{ending}").write_bytes((folder / f"002.{ending}").read_bytes())
    (folder / "009.png").write_bytes(b"damaged")
    return folder


def run(source: Path, loaded: Sequence[Reward], cache: ScoreCache, out: Path) -> tuple[ScoreTable | None, list[int]]:
    tower = Counted(loaded[0].backbone)
    tower.forget()  # as a new process
    rewards = [*(Plain(reward, tower) for reward in loaded), Picky(loaded[0], tower), Brightness(Means())]
    try:
        score(open_items(source), Scorer(rewards, cache, batch_size=BATCH), out, progress=False)
    except Stop:
        return None, tower.batches
    return read_table(out), tower.batches


def test_the_bits_of_a_score_do_depend_on_its_batch(loaded: list[Reward]) -> None:
    """Or this file would test nothing."""
    tower, prompts = loaded[0].backbone, [f"thing {number}" for number in range(8)]
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in prompts]
    tower.forget()
    together = loaded[0].score(pictures, prompts)
    tower.forget()
    alone = torch.cat([loaded[0].score([picture], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.equal(together, alone)


def test_stopped_at_any_write_and_run_again_the_table_is_the_same(tmp_path: Path, source: Path, loaded: list[Reward]) -> None:
    whole, alone = run(source, loaded, ScoreCache(tmp_path / "whole"), tmp_path / "whole.parquet")
    assert whole is not None
    assert [place for place, why in enumerate(whole.texts("why.picky")) if why] == [5, 9, 19]
    for writes in range(100):
        folder, out = tmp_path / str(writes), tmp_path / f"{writes}.parquet"
        done, first = run(source, loaded, Stopping(folder, writes), out)
        assert (done is not None) is out.exists()
        if done is not None:
            break
        table, second = run(source, loaded, ScoreCache(folder), out)
        assert table is not None
        assert table.data.equals(whole.data), writes
        again = sum(first) + sum(second) - sum(alone)
        assert again <= BATCH + 2, writes  # the batch in flight, and what fails whenever it is tried
    assert 20 < writes < 99  # every write there is


def test_batches_end_with_their_stretch(tmp_path: Path) -> None:
    """So that a worker of a cluster, which is given a stretch, makes the batches that one machine makes."""
    batches: list[int] = []

    class Seen(Means):
        def see(self, inputs: Sequence[Tensor]) -> Tensor:
            batches.append(len(inputs))
            return super().see(inputs)

    folder = tmp_path / "p"
    folder.mkdir()
    count = STRETCH + 40
    for number in range(count):
        data = b"damaged" if number == 3 else encoded(Image.new("RGB", (1, 1), (number % 256, number // 256, 0)))
        (folder / f"{number:05d}.png").write_bytes(data)
    scorer = Scorer([Brightness(Seen())], ScoreCache(tmp_path / "c"), batch_size=100)
    assert scorer.stretch == 600  # whole batches
    scorer = Scorer([Brightness(Seen())], ScoreCache(tmp_path / "c"), batch_size=64)
    assert scorer.stretch == STRETCH
    score(open_items(folder), scorer, tmp_path / "t.parquet", progress=False)
    assert batches == [64] * 7 + [63, 40]
