"""A β that moves while a run trains, for any objective that has one: see `settings.Switches.beta`.

As in `terms.Carry`, all statistics come from the steps before, so that a comparison's loss does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.align.carried import Carried
from flowalign.align.terms import Carry, Terms
from flowalign.settings import Switches

RATE, REACH = 0.2, 10.0
"""target: how fast log β moves per step and unit of factor, and how far β may get from where it began, as a factor."""
GAIN, DECAY, FLOOR = 0.6, 0.9, 0.01
"""batch: a and the running mean's decay of β-DPO's authors' code, and the smallest share of β."""


def gradient_factor(terms: Terms, beta: float | Tensor) -> Tensor:
    """`[B]` σ(−βΔ), in expectation over a soft label: the share of its gradient that the logistic loss still has at Δ."""
    return terms.expected(lambda reward: torch.sigmoid(-reward), margin=beta * terms.margin.detach())


def _observe_factor(
    terms: Terms, carried: Mapping[str, Tensor], *, beta: float, factor: float, steps: int
) -> dict[str, Tensor]:
    return {"factor": gradient_factor(terms, carried["beta"])}


def _advance_factor(
    carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, beta: float, factor: float, steps: int
) -> dict[str, Tensor]:
    """log β ← log β + rate·(mean factor − target): where margins are small the factor is near ½, and β grows."""
    moved = carried["beta"] * torch.exp(RATE * (means["factor"] - factor))
    return {"beta": moved.clamp(beta / REACH, beta * REACH)}


def _observe_reward(
    terms: Terms, carried: Mapping[str, Tensor], *, beta: float, factor: float, steps: int
) -> dict[str, Tensor]:
    return {"reward": terms.expected(lambda reward: reward, margin=beta * terms.margin.detach())}


def _advance_reward(
    carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, beta: float, factor: float, steps: int
) -> dict[str, Tensor]:
    """β(1 + a(mean βΔ − running mean)), Wu et al. 2024, 2407.08639, without the filter that `beta_dpo` has too."""
    mean = DECAY * carried["mean"] + (1 - DECAY) * means["reward"]
    return {"beta": beta * (1 + GAIN * (means["reward"] - mean)).clamp_min(FLOOR), "mean": mean}


def _advance_cosine(
    carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, beta: float, factor: float, steps: int
) -> dict[str, Tensor]:
    """β(¾ + ¼ cos π·step/steps): from β to half of it, as PNAPO has it."""
    step = carried["step"] + 1
    return {"beta": beta * (0.75 + 0.25 * torch.cos(math.pi * (step / steps).clamp_max(1))), "step": step}


CARRIES = {
    "target": Carry(lambda beta, factor, steps: {"beta": beta}, _observe_factor, _advance_factor),
    "batch": Carry(lambda beta, factor, steps: {"beta": beta, "mean": 0.0}, _observe_reward, _advance_reward),
    "cosine": Carry(lambda beta, factor, steps: {"beta": beta, "step": 0.0}, _observe_factor, _advance_cosine),
}
"""By the name in `switches.beta`."""


def adaptive(
    switches: Switches,
    knobs: Mapping[str, Any],
    device: torch.device,
    mean: Callable[[Tensor], Tensor] = lambda values: values,
    *,
    steps: int,
) -> Carried | None:
    """What moves β as `switches.beta` says; None where it is fixed.

    mean: of a tensor over all processes. steps: of the whole run.
    """
    if switches.beta == "fixed":
        return None
    own = {"beta": knobs["beta"], "factor": switches.target_factor, "steps": steps}
    return Carried(CARRIES[switches.beta], own, device, mean, name="adaptive")
