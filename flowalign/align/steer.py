"""One policy for many trade-offs: a denoiser that is told the weights of several objectives beside the prompt.

MO-ODPO, Gupta et al. 2025, arXiv 2503.00295, see docs/steer.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowalign.align.terms import Terms
from flowalign.data.batch import Batch, Conditioning
from flowalign.data.weights import WEIGHTS
from flowalign.families.base import CONTEXT, Family
from flowalign.families.steer import Shift, shift_for
from flowalign.rng import Keyed, key
from flowalign.settings import Steer

HIGH = 0.9
"""A score that sample pictures are drawn for."""


class Steered(nn.Module):
    """A denoiser whose prompts are shifted by what the weights of the objectives say; before training by nothing."""

    shift: nn.Module
    """What is told the weights."""

    def __init__(self, denoiser: nn.Module, shift: Shift) -> None:
        super().__init__()
        self.denoiser, self.shift = denoiser, shift

    def forward(self, family: Family, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction `[R, C, h, w]`; `conditioning` holds the weights `[R, K]` under `WEIGHTS`."""
        tokens = self.shift(conditioning.tensors[CONTEXT], conditioning.tensors[WEIGHTS])
        return family.predict(self.denoiser, x_t, t, conditioning.joined(CONTEXT, tokens))


def steered_policy(
    policy: nn.Module, steer: Steer | None, width: int, seed: int, learned: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A policy that is ready to train, as the settings steer it. width: D of the prompt's tokens. learned: what the network
    holds already; nothing begins it anew."""
    if steer is None or steer.form == "prompt":
        return policy
    device, shift = next(policy.parameters()).device, shift_for(steer, width, key(seed, "steer"))
    if learned:
        shift.load_state_dict(learned)
    return Steered(policy, shift.to(device))


def contrast_of(steer: Steer | None) -> float:
    """β_w, 0 where weights are not held against others."""
    return 0.0 if steer is None else steer.contrast


def by_part(policy: nn.Module) -> tuple[nn.Module, Any]:
    """(the denoiser, what steers it) of a policy."""
    return (policy.denoiser, policy.shift) if isinstance(policy, Steered) else (policy, None)


def asked(batch: Batch, told: Conditioning, of_pictures: Callable[[Conditioning], Conditioning]) -> Conditioning:
    """What the policy is told about each of the B·N pictures, from what the reference is.

    of_pictures: a row for each comparison -> one for each picture, on the device.
    """
    if batch.policy_conditioning is not None:
        told = of_pictures(batch.policy_conditioning)
    if batch.objective_weights is not None:
        weights, pictures = batch.objective_weights, batch.mean.shape[1]
        given = of_pictures(Conditioning({WEIGHTS: weights})).tensors[WEIGHTS]
        if weights.dim() == 3:  # each picture's own
            given = given[::pictures].flatten(0, 1)
        told = told.joined(WEIGHTS, given)
    return told


def elsewhere(batch: Batch, rng: Keyed) -> tuple[Tensor, Tensor]:
    """(other weights `[B, K]`, even on the simplex and keyed like all that is drawn; whether the policy is told any, `[B]`)"""
    weights = batch.objective_weights
    if weights is None:
        raise ValueError("a contrast between weights needs comparisons that have some")
    drawn = [-torch.log1p(-rng.uniform(f"contrast-{place}", batch.ids, batch.draws)) for place in range(weights.shape[1])]
    parts = torch.stack(drawn, 1).to(weights.device)  # meta where a step is only counted
    told = weights.any(1)
    return torch.where(told[:, None], parts / parts.sum(1, keepdim=True), 0.0).to(weights.dtype), told


def contrast(terms: Terms, beta: float) -> Tensor:
    """`[B]` −log σ(β_w (h(y|w⁺) − sg h(y|w⁻))) of the chosen y, their mean; h = ½(e_ref − e), and the reference cancels.

    MI-EPO (Xie et al. 2026, 2607.01392): what was made under one w shall be likelier under it than under others.
    """
    apart = 0.5 * (terms.given("other_error") - terms.policy_error[:, : terms.num_chosen])
    return -F.logsigmoid(beta * apart).mean(1)


def even_and_corners(steer: Steer) -> list[dict[str, float]]:
    """The middle of the simplex, then its corners: what sample pictures are drawn under.

    Of scores, high ones by all objectives, then by one and middling ones by the others.
    """
    names = steer.objectives
    if steer.condition == "scores":
        high = dict.fromkeys(names, HIGH)
        return [high, *({name: HIGH if name == each else 0.5 for name in names} for each in names)]
    corners = torch.eye(len(names)).tolist()
    return [dict.fromkeys(names, 1 / len(names)), *(dict(zip(names, row, strict=True)) for row in corners)]
