"""Grid peaks: whether the picture repeats with the decoder's stride, which checkerboards and seams of blocks do.

A pattern that repeats every s pixels has its energy at the frequencies (i/s, j/s) alone. Each of these is compared with the
spectrum around it, so that neither texture nor edges count: what is left are peaks. The score is log10 of the mean ratio, at
least 1 at each: 0 is a spectrum without peaks, noise about 0.1, and 1 ten times as much energy in the grid as beside it.

Sources: Odena et al., 2016, "Deconvolution and checkerboard artifacts", Distill; Zhang et al., 2019, arXiv:1907.06515 (peaks of
upsampling in the spectra of generated pictures); Moisan, 2011, J. Math. Imaging Vis. 39 (periodic plus smooth decomposition).
What repeats in the scene itself with just that period, and blocks of strong JPEG compression (period 8), count as well; so does
an oblique line without antialiasing across all of a flat drawing.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from flowalign.errors import ConfigError, RunError
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels, grey

COMPARED = 8
"""How many frequencies to either side of a grid frequency it is compared with, at most."""
ROUNDING = 1 / 12
"""Variance of rounding to grey levels: nothing below it is a peak."""


def grid_peak(pictures: Tensor, stride: int) -> Tensor:
    """`[N, 3, H, W]` in [0, 1] -> `[N]`. Raises RunError for pictures of fewer than two periods in height or width."""
    rows, columns = (length // stride for length in pictures.shape[2:])
    if min(rows, columns) < 2:
        size = f"{pictures.shape[3]}x{pictures.shape[2]}"
        raise RunError(
            f"a picture of {size} pixels has fewer than two periods of {stride}; give a larger picture, or a smaller stride."
        )
    y = 255 * grey(pictures)[:, : rows * stride, : columns * stride]  # whole periods: the grid is exactly at frequencies of it
    power = _periodic_spectrum(y, stride).abs().square()
    floor = ROUNDING * y.shape[1] * y.shape[2]
    grid = power[:, ::rows, ::columns]
    around = _around(power, stride)
    ratios = ((grid + floor) / (around + floor)).flatten(1)[:, 1:]  # the first is the mean brightness
    return ratios.clamp_min(1).mean(1).log10()  # a hole in the spectrum does not make up for a peak


def _around(power: Tensor, stride: int) -> Tensor:
    """`[N, H, W]` -> at the grid's frequencies `[N, stride, stride]`, what their neighbours let expect: their median / ln 2,
    as the power of noise is exponentially distributed.

    The largest of three medians: along the column and the row of the spectrum and outwards from its middle. A straight edge is
    a ridge in one of these directions, and no peak. Neighbours lie from a quarter of the spacing to half of it away: a grid
    that is fainter in some parts of the picture than in others spreads to what is nearer.
    """
    height, width = power.shape[1:]
    order = torch.fft.fftfreq(stride, 1 / stride, device=power.device)  # 0, 1, ..., -2, -1
    down, across = torch.meshgrid(order * (height // stride), order * (width // stride), indexing="ij")
    furthest = torch.maximum(down.abs(), across.abs()).clamp_min(1)
    directions = ((1.0, 0.0, height), (0.0, 1.0, width), (down / furthest, across / furthest, min(height, width)))
    medians = []
    for toward_down, toward_across, length in directions:
        steps = _steps(length // stride)
        places = [(down + step * toward_down, across + step * toward_across) for step in (*steps, *(-step for step in steps))]
        neighbours = torch.stack([power[:, y.round().long() % height, x.round().long() % width] for y, x in places])
        middle = neighbours.sort(0).values[len(steps) - 1 : len(steps) + 1]  # of an even number
        medians.append(middle.mean(0) / math.log(2))
    return torch.stack(medians).amax(0)


def _steps(spacing: int) -> list[int]:
    """Distances of neighbours, at most `COMPARED`, where the grid's own frequencies are `spacing` apart."""
    nearest, furthest = max(1, spacing // 4), max(1, spacing // 2)
    every = -(-(furthest - nearest + 1) // COMPARED)
    return list(range(nearest, furthest + 1, every))


def _periodic_spectrum(y: Tensor, stride: int) -> Tensor:
    """Fourier transform `[N, H, W]` of the periodic part of pictures: without the cross that the jump between opposite edges
    makes, and without a window that would smear peaks. The jump is between means over a period, so that no grid is part of it.
    """
    height, width = y.shape[1:]
    y = y - y.mean((1, 2), keepdim=True)
    jumps = torch.zeros_like(y)
    top = y[:, -stride:].mean(1) - y[:, :stride].mean(1)
    left = y[:, :, -stride:].mean(2) - y[:, :, :stride].mean(2)
    for index, jump in ((0, top), (height - 1, -top)):
        jumps = jumps.index_add(1, torch.tensor([index], device=y.device), jump[:, None])
    for index, jump in ((0, left), (width - 1, -left)):
        jumps = jumps.index_add(2, torch.tensor([index], device=y.device), jump[:, :, None])
    turns = (torch.fft.fftfreq(n, device=y.device, dtype=y.dtype) for n in (height, width))
    cosines = [2 * torch.cos(2 * math.pi * turn) for turn in turns]
    laplacian = cosines[0][:, None] + cosines[1][None] - 4
    laplacian[0, 0] = 1  # where both transforms are 0
    return torch.fft.fft2(y) - torch.fft.fft2(jumps) / laplacian


def load(shelf: Shelf, *, stride: int = 8) -> Reward:
    """stride: how many pixels one latent becomes in each direction, 8 for Stable Diffusion. Raises ConfigError below 2."""
    if stride < 2:
        raise ConfigError(f"stride is {stride}; it must be at least 2, such as 8 for Stable Diffusion's decoder.")
    return Formula(
        Card(
            name="grid_peak",
            title="Grid peaks: artefacts that repeat with the decoder's stride",
            range=(0.0, math.inf),
            better="lower",
            licence="formula",
            source="Zhang et al., 2019, arXiv:1907.06515",
            weights="none",
            reads_prompt=False,
            differentiable=True,
            fingerprint=f"grid_peak-2-{stride}",
        ),
        Pixels.of(shelf),
        partial(grid_peak, stride=stride),
    )


REWARD = load
