"""Grid peak: periodic patterns at a decoder's stride, which stand out of a picture's spectrum as single frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels, grey

PERIODS = (2, 4, 8)
"""Pixels; what upsampling by factors of two leaves."""
AROUND = 2
"""Frequencies on either side that a peak is held against, itself and its neighbours left out."""
FLOOR = 1e-6
"""Added to magnitudes: what is below it is nothing, for a picture in [0, 1]."""


def grid_peak(picture: Tensor) -> Tensor:
    """Largest log₁₀ (magnitude at a grid's frequency / median magnitude around it); `[3, H, W]` in [0, 1] -> a number >= 0.

    Looked at are rows and columns: each axis's spectrum, the mean over the other axis of the magnitudes of the lines of
    luma, at frequencies 1/2, 1/4 and 1/8 and the multiples of the latter. 0 where no axis has 16 pixels.
    """
    plane = grey(picture)
    found = [_peak(lines) for lines in (plane, plane.T) if lines.shape[1] >= 2 * max(PERIODS)]
    return torch.stack(found).max().clamp_min(0) if found else plane.new_zeros(())


def _peak(lines: Tensor) -> Tensor:
    length = lines.shape[1] - lines.shape[1] % max(PERIODS)  # so that grids fall on whole frequencies
    magnitude = torch.fft.rfft(lines[:, :length], norm="forward").abs().mean(0) + FLOOR
    step = length // max(PERIODS)
    last = len(magnitude) - 1
    peaks = []
    for place in range(step, last + 1, step):
        near = [n for n in range(place - AROUND - 1, place + AROUND + 2) if abs(n - place) > 1 and 0 < n <= last]
        peaks.append((magnitude[place] / magnitude[near].median()).log10())
    return torch.stack(peaks).max()


def load(shelf: Shelf) -> Reward:
    card = Card(
        name="grid_peak",
        title="grid artefacts: peaks of the spectrum at a decoder's stride",
        range=(0.0, math.inf),
        better="lower",
        licence="formula",
        source="after Zhang et al. 2019, arXiv 1907.06515 (spectra of upsampling), the ratio is ours",
        weights="none",
        reads_prompt=False,
        differentiable=True,
        fingerprint="grid_peak-1",
    )
    return Formula(card, Pixels.of(shelf), grid_peak)


REWARD = load
