"""The noise that a model takes a picture to: the deterministic sampler run backwards, from the picture to a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowalign.families.base import Family

TINY = 1e-12


def inverted(family: Family, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, steps: int) -> Tensor:
    """ε̂ `[B, C, h, w]` with which `family.noisy(x0, ε̂, t)` is where the inversion of x0 `[B, C, h, w]` arrives at t `[B]`.

    `predict(x, u)` is the denoiser's prediction. The way is cut into `steps` equal parts of t, so the last ends at t itself.
    A step from time s to u follows DDIM (Song et al. 2021, 2010.02502, eq. 12), which for a flow is Euler's method, with the
    prediction at x_s told the time u, as diffusers' DDIMInverseScheduler has it. In terms of the noise that x_s = a x0 + b ε̂
    implies it is a running mean: ε̂ ← r ε̂ + (1 − r) ε(x_s), r the ratio of b/a at s to that at u. The picture is where b = 0.
    """
    noise, sigma = torch.zeros_like(x0), torch.zeros_like(x0[:, :1, :1, :1])
    signal = torch.ones_like(sigma)
    for step in range(1, steps + 1):
        time = t * (step / steps)
        x = signal * x0 + sigma * noise
        told = family.implied(x, predict(x, time), signal, sigma)
        before = sigma / signal.clamp_min(TINY)
        signal, sigma = family.scales(time, x0)
        ratio = before / (sigma / signal.clamp_min(TINY)).clamp_min(TINY)
        noise = ratio * noise + (1 - ratio) * told
    return noise
