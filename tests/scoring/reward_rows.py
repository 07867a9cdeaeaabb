"""One row per reward: how to build a tiny instance of it without the network, and what must score better than what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flowalign.scoring.rewards.base import Reward, Shelf

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
    gradient_tolerance: float | None = None
    """How far `score_pixels` may be from `score` on the same picture, in units of the score; None where it has no gradient
    or reads pixels in a way that cannot be compared."""


ROWS: dict[str, Row] = {}
