"""Where on the way from picture to noise a comparison is trained: the samplers of times, and one that learns.

Every sampler is two choices: how numbers in [0, 1] are spread over comparisons, and how they are bent into times. Importance
sampling moves the spread numbers to where gradients are large, and gives each comparison the weight that takes this back in
expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowalign.align.terms import Terms
from flowalign.data.batch import Batch
from flowalign.families.base import Family
from flowalign.rng import Keyed

BINS = 16
"""Parts of [0, 1] whose gradients are told apart."""
FLOOR = 0.25
"""Share of draws that stay even, so that no weight exceeds 1 / FLOOR."""
FORGET = 0.9
"""What a refresh keeps of older observations."""
PRIOR = 4.0
"""Observations at the overall mean that every bin starts with."""


def _uniform(rng: Keyed, batch: Batch) -> Tensor:
    return rng.uniform("timestep", batch.ids, batch.draws)


def _stratified(rng: Keyed, batch: Batch) -> Tensor:
    return rng.stratified("timestep", batch.positions)


def _antithetic(rng: Keyed, batch: Batch) -> Tensor:
    """Positions 2j and 2j+1 get u_j and 1 − u_j, so that what is linear in time cancels (Hammersley & Morton 1956)."""
    even = rng.stratified("timestep", [position // 2 for position in batch.positions])
    mirrored = torch.tensor([position % 2 == 1 for position in batch.positions])
    return torch.where(mirrored, 1 - even, even)


def _straight(even: Tensor, batch: Batch, family: Family) -> Tensor:
    return even


def _logit_normal(even: Tensor, batch: Batch, family: Family) -> Tensor:
    """σ(z), z ~ N(0, 1): middle times more often (Esser et al. 2024, 2403.03206, eq. 19); z by the inverse of its CDF."""
    return torch.special.ndtri(even.clamp(1e-6, 1 - 1e-6)).sigmoid()


def _shifted(even: Tensor, batch: Batch, family: Family) -> Tensor:
    height, width = batch.mean.shape[-2:]
    return family.shifted(even, (height, width))


class Sampler(NamedTuple):
    """How times are drawn; both parts give `[B]`, float64."""

    spread: Callable[[Keyed, Batch], Tensor]
    """Numbers in [0, 1] of a batch, each uniform over runs."""
    bend: Callable[[Tensor, Batch, Family], Tensor]
    """From those numbers to times in [0, 1]."""


TIMESTEPS: dict[str, Sampler] = {
    "uniform": Sampler(_uniform, _straight),
    "stratified": Sampler(_stratified, _straight),
    "antithetic": Sampler(_antithetic, _straight),
    "logit_normal": Sampler(_stratified, _logit_normal),
    "shifted": Sampler(_stratified, _shifted),
}


class Importance:
    """Draws parts of [0, 1] in proportion to the root mean square gradient expected there, mixed with FLOOR of even draws.

    What is expected is the gradient of the loss in the predictions, observed at every step, times a `gain`: how much larger the
    gradient in the weights is, measured once (`PreferenceStep.gains`). That proportion gives the least variance of the mean
    gradient (Katharopoulos & Fleuret 2018, 1803.00942, §3); over times, with losses in place of gradients, it is the resampling
    of Nichol & Dhariwal 2021, 2102.09672, eq. 18. Losses say nothing here: before training every one is the same. Observing is
    work for the device alone; the table is read back, and changes, only in `refresh`.
    """

    def __init__(self, device: torch.device, gather: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        """gather: the rows `[B]` of every rank, in their order, so that all ranks learn the same."""
        self.probability = torch.full((BINS,), 1 / BINS, dtype=torch.float64)
        """`[BINS]` share of the draws, on the CPU, where times are made."""
        self.seen = torch.zeros(2, BINS, device=device)
        """Sum of squared gradients, and their number, of each bin."""
        self.gain = torch.ones(BINS, dtype=torch.float64)
        """`[BINS]` relative size of gradients in the weights, for gradients in the predictions of one size; on the CPU."""
        self._gather = gather

    def only(self, part: int) -> Importance:
        """One that draws nowhere but in one of the bins."""
        other = Importance(self.seen.device)
        other.probability.zero_()[part] = 1.0
        return other

    def learn_gain(self, squares: Tensor) -> None:
        """squares: `[2, BINS]` sums of squared gradients, in the weights and in the predictions; those of rank 0 count."""
        weights, predictions = self._gather(squares[None])[0].cpu().double()
        gain = (weights / predictions).sqrt()
        if gain.isfinite().all() and gain.sum() > 0:
            self.gain.copy_(gain / gain.mean())
            self.probability.copy_(self._mixed(self.gain))

    def place(self, even: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Even numbers `[B]` -> (where they are moved to, the bins they fall into, weights 1 / (BINS · probability))."""
        ends = self.probability.cumsum(0)
        bins = torch.searchsorted(ends, even, right=True).clamp(max=BINS - 1)
        chance = self.probability[bins]
        inside = ((even - ends[bins] + chance) / chance).clamp(0, 1)
        return (bins + inside) / BINS, bins, 1 / (BINS * chance)

    def observe(self, bins: Tensor, squares: Tensor) -> None:
        """Squared gradients `[B]` of comparisons whose numbers fell into `bins` `[B]`, both on the device."""
        member = (self._gather(bins)[:, None] == torch.arange(BINS, device=bins.device)).to(squares.dtype)
        rows = self._gather(squares)
        self.seen += torch.stack([(member * rows[:, None]).sum(0), member.sum(0)])

    def refresh(self) -> None:
        """Draw from now on by what was observed; this waits for the device."""
        total, count = self.seen.cpu().double()
        if total.sum() > 0:
            size = ((total + PRIOR * total.sum() / count.sum()) / (count + PRIOR)).sqrt()
            self.probability.copy_(self._mixed(size * self.gain))
        self.seen *= FORGET

    def _mixed(self, size: Tensor) -> Tensor:
        return (1 - FLOOR) * size / size.sum() + FLOOR / BINS

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, to be restored in place."""
        return {"timesteps/probability": self.probability, "timesteps/seen": self.seen, "timesteps/gain": self.gain}


def squared_gradient(loss: Tensor, terms: Terms) -> Tensor:
    """‖∂loss/∂predictions‖² of each comparison, `[B]`, without the factor 4 / elements that all share; detached.

    With a = prediction − target and b = prediction − the reference's, a loss of slopes g in e and k in q has a gradient along
    ga + kb, and mean a·b = ½(e + q − e_ref): no second pass through the denoiser is needed. A last layer's gradient in place of
    the whole one is the bound of Katharopoulos & Fleuret 2018, 1803.00942, §3.
    """
    wanted = [terms.policy_error] if terms.drift is None else [terms.policy_error, terms.drift]
    slopes = torch.autograd.grad(loss.sum(), wanted, retain_graph=True, allow_unused=True)
    g, k = (torch.zeros_like(terms.policy_error) if slope is None else slope for slope in (*slopes, None)[:2])
    e = terms.policy_error.detach()
    square = g.square() * e
    if terms.drift is not None and terms.reference_error is not None:
        q = terms.drift.detach()
        square = square + k.square() * q + g * k * (e + q - terms.reference_error)
    return square.sum(1)
