"""One row per reward: how to build a tiny instance of it without the network, and what must score better than what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring import tiny_towers

Pair = tuple[tuple[Image.Image, str], tuple[Image.Image, str]]
"""A picture with its prompt that is better, and one that is worse."""


@dataclass(frozen=True)
class Row:
    """How the contract battery meets a reward."""

    make: Callable[[Path, Shelf], Reward]
    """Given an empty folder for the files that it needs, and a shelf, an instance; the same one each time it is called."""
    better: Callable[[], list[Pair]] | None = None
    """Pairs that prove its direction; None where the weights are random."""
    tolerance: float = 1e-5
    """How far scores may move with the size of the batch, relative to the largest of them."""
    pixels_tolerance: float | None = None
    """How far `score_pixels` may be from `score` on the same picture, in units of the score; None where it has no gradient
    or reads pixels in a way that cannot be compared."""


def loaded(shelf: Shelf, name: str, **settings: object) -> Reward:
    """As a user names it."""
    return load_rewards([{"name": name, **settings}], shelf)[0]


def _hpsv2(folder: Path, shelf: Shelf) -> Reward:
    config, checkpoint = tiny_towers.hps_checkpoint(folder)
    return loaded(shelf, "hpsv2", model=str(config), weights=str(checkpoint))


def _aesthetic(folder: Path, shelf: Shelf) -> Reward:
    model = tiny_towers.open_clip_folder(folder)
    return loaded(shelf, "aesthetic", model=str(model), weights=str(tiny_towers.head(folder, "v2")))


ROWS: dict[str, Row] = {
    "aesthetic": Row(_aesthetic),
    "clip": Row(lambda folder, shelf: loaded(shelf, "clip", model=str(tiny_towers.open_clip_folder(folder)))),
    "hpsv2": Row(_hpsv2),
    "pickscore": Row(lambda folder, shelf: loaded(shelf, "pickscore", model=str(tiny_towers.transformers_clip(folder)))),
    "siglip": Row(lambda folder, shelf: loaded(shelf, "siglip", model=str(tiny_towers.transformers_siglip(folder)))),
}
