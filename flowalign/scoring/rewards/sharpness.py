"""Sharpness: how strongly brightness bends from one pixel to the next."""

from __future__ import annotations

from torch import Tensor

from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels, filtered, grey

LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
SPREAD = 1e-12
"""Keeps the root's slope finite on a picture of one colour."""


def sharpness(pictures: Tensor) -> Tensor:
    """Standard deviation of the Laplacian of luma, over all pixels; `[N, 3, H, W]` in [0, 1] -> `[N]` in [0, 4]."""
    return (filtered(grey(pictures), LAPLACIAN).var((1, 2), correction=0) + SPREAD).sqrt()


def load(shelf: Shelf) -> Reward:
    card = Card(
        name="sharpness",
        title="how sharp: spread of the Laplacian of luma",
        range=(0.0, 4.0),
        better="higher",
        licence="formula",
        source="Pech-Pacheco et al. 2000, Diatom autofocusing in brightfield microscopy (variance of the Laplacian)",
        weights="none",
        reads_prompt=False,
        differentiable=True,
        fingerprint="sharpness-1",
    )
    return Formula(card, Pixels.of(shelf), sharpness)


REWARD = load
