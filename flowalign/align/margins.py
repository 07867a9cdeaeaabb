"""Implicit margins: by how much the present model denoises the chosen pictures better than the rejected ones.

Reference-free, l = −e/2, over a panel of times and noise that all pictures of all comparisons share, so that margins differ
by what the pictures are and not by what was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowalign.data.batch import GEOMETRY, Batch
from flowalign.errors import NonFiniteError
from flowalign.families.base import Family
from flowalign.rng import Keyed


@dataclass(frozen=True)
class Panel:
    """K shared draws: times in the middles of K equal parts of [0, 1], and noise that belongs to the seed alone."""

    draws: int
    seed: int = 0

    @property
    def times(self) -> Tensor:
        """`[K]`, float32, on the CPU."""
        return (torch.arange(self.draws) + 0.5) / self.draws

    def noise(self, draw: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers of that shape, float32, on the CPU."""
        return Keyed(self.seed).normal("panel", [0], [draw], shape)[0]


@torch.no_grad()
def panel_errors(family: Family, denoiser: nn.Module, batch: Batch, panel: Panel, device: torch.device) -> Tensor:
    """e of every picture at every draw, `[B, N, K]`, float32 on `device`; pictures are the means of their posteriors."""
    count, pictures, *shape = batch.mean.shape
    x0 = batch.mean.to(device, torch.float32).flatten(0, 1)
    conditioning = batch.conditioning.to(device).repeat(pictures)
    conditioning = conditioning.joined(GEOMETRY, batch.geometry.to(device).flatten(0, 1))
    errors = []
    for draw, time in enumerate(panel.times.to(device)):
        noise = panel.noise(draw, tuple(shape)).to(device).expand_as(x0)
        x_t, target = family.noisy(x0, noise, time.expand(len(x0)))
        residual = family.predict(denoiser, x_t, time.expand(len(x0)), conditioning).float() - target
        errors.append(residual.square().flatten(1).mean(1).view(count, pictures))
    return torch.stack(errors, dim=2)


def implicit_margins(errors: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """Errors `[B, N, K]` -> (l_chosen − l_rejected, its standard error over the draws), each `[B]`.

    l is the mean of −e/2 over draws and over the chosen, or the rejected, pictures. Raises NonFiniteError.
    """
    if not bool(errors.isfinite().all()):
        raise NonFiniteError("the model's errors hold NaN or infinity; check that the checkpoint is whole, or use fp32.")
    per_draw = 0.5 * (errors[:, num_chosen:].mean(1) - errors[:, :num_chosen].mean(1)).double()
    spread = per_draw.std(1) if per_draw.shape[1] > 1 else torch.full((len(per_draw),), torch.nan)
    return per_draw.mean(1), spread / per_draw.shape[1] ** 0.5
