"""Colourfulness: how far colours spread and lie from grey."""

from __future__ import annotations

from torch import Tensor

from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels

SPREAD = 1e-12
"""Keeps the roots' slopes finite on a grey picture."""


def colourfulness(pictures: Tensor) -> Tensor:
    """M = σ_rgyb + 0.3 μ_rgyb with rg = R − G and yb = ½(R + G) − B of 0 to 255; `[N, 3, H, W]` in [0, 1] -> `[N]`.

    0 is grey, 15 slightly, 45 averagely, 82 highly, 109 extremely colourful by the authors' raters.
    """
    red, green, blue = (255 * pictures).flatten(2).unbind(1)
    rg, yb = red - green, 0.5 * (red + green) - blue
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0) + SPREAD).sqrt()
    return spread + 0.3 * (rg.mean(1).square() + yb.mean(1).square() + SPREAD).sqrt()


def load(shelf: Shelf) -> Reward:
    card = Card(
        name="colourfulness",
        title="how colourful, as people say it",
        range=(0.0, 300.0),
        better="higher",
        licence="formula",
        source="Hasler and Suesstrunk 2003, Measuring colourfulness in natural images, M(3)",
        weights="none",
        reads_prompt=False,
        differentiable=True,
        fingerprint="colourfulness-1",
    )
    return Formula(card, Pixels.of(shelf), colourfulness)


REWARD = load
