"""What any objective can be combined with: pure functions of errors, dots and noise levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.align.carried import Carried
from flowalign.align.reference import MOVING
from flowalign.align.terms import Objective, Terms
from flowalign.data.fill import Cached
from flowalign.errors import ConfigError
from flowalign.families.base import Level
from flowalign.settings import Config, Switches

TINY = 1e-12


def safeguarded(error: Tensor, residual_dot: Tensor, mu: float) -> Tensor:
    """Errors `[B, 2]` of the same values, through which the rejected picture's gradient is scaled by λ, per pair.

    λ = clip((1−μ) ‖g_w‖² / (g_w·g_l), 0, 1) where g_w·g_l > 0, else 1, with g the gradients of the errors in the predictions,
    so that a step along −g_w + λ g_l does not raise e_w to first order. Up to a factor that cancels, g is the residual: ‖g_w‖²
    is e_w itself, and g_w·g_l is `residual_dot` `[B]`.

    Source: SDPO, 2025, arXiv 2511.03317, whose code takes one λ for a micro-batch; here every pair has its own, so that a
    pair's gradient does not depend on its neighbours.
    """
    chosen, rejected = error.unbind(1)
    with torch.no_grad():
        limit = ((1 - mu) * chosen / residual_dot.clamp_min(TINY)).clamp(0, 1)
        scale = torch.where(residual_dot > 0, limit, 1.0)
    held = rejected.detach()
    return torch.stack([chosen, held + scale * (rejected - held)], dim=1)


def time_weight(level: Level, switches: Switches) -> Tensor:
    """`[B]` factors on the losses of comparisons at these noise levels, float32.

    min_snr: min(SNR, γ) on the error of x0, that is min(SNR, γ) times `level.to_x0` on the error of the prediction (Hang et al.
    2023, 2303.09556, §3.4). sigmoid: σ(b − log SNR) (Kingma & Gao 2023, 2303.00848; Hoogeboom et al. 2024, 2410.19324).
    """
    if switches.time_weight == "min_snr":
        return level.log_snr.exp().clamp_max(switches.min_snr_gamma) * level.to_x0
    if switches.time_weight == "sigmoid":
        return torch.sigmoid(switches.sigmoid_bias - level.log_snr)
    return torch.ones_like(level.log_snr)


def check(config: Config, objective: Objective, knobs: dict[str, Any], *comparisons: Cached) -> None:
    """Raise ConfigError for what does not go together with an objective, and with these comparisons."""
    name, kind, needs = config.objective.name, config.reference.kind, objective.needs
    shapes = {(each.pictures.shape[1], each.num_chosen) for each in comparisons}
    for need in sorted(needs & {"scores", "grades"}):
        bare = sum(int(np.isnan(getattr(each, need)).any(1).sum()) for each in comparisons)
        if bare:
            several = ", or several rewards: name those that count in data.rewards" if need == "scores" else ""
            raise ConfigError(
                f"objective.name {name!r} reads {need}, and {bare} comparisons have none{several}; give every row {need}, or "
                "choose another objective."
            )
    if kind in MOVING and not needs & {"reference", "drift"}:
        raise ConfigError(
            f"reference.kind {kind!r} moves a reference, but objective.name {name!r} needs none; set reference.kind=auto."
        )
    for pictures, num_chosen in sorted(shapes):
        _fits(config, objective, knobs, pictures, num_chosen)


def _fits(config: Config, objective: Objective, knobs: dict[str, Any], pictures: int, num_chosen: int) -> None:
    """Raise ConfigError where the objective, or the safeguard, cannot take comparisons of so many pictures."""
    name = config.objective.name
    if config.switches.safeguard is not None and pictures != 2:
        raise ConfigError(
            f"switches.safeguard weighs one rejected picture against one chosen, but these comparisons have {pictures} "
            "pictures; set switches.safeguard=null."
        )
    if pictures == 1 and objective.takes != "unpaired":
        raise ConfigError(
            f"objective.name {name!r} compares pictures, and in these data each was judged alone; take an objective for "
            "unpaired pictures (flowalign objectives lists them), or data of pairs."
        )
    ones = torch.ones(1, pictures)
    given = {each: ones[:, 0] if each == "residual_dot" else ones for each in objective.needs - {"reference", "drift"}}
    try:
        carried = () if objective.carry is None else (Carried(objective.carry, knobs, torch.device("cpu")).scalars,)
        objective(Terms(ones, ones, ones, ones[:, 0], num_chosen, **given), *carried, **knobs)
    except ValueError as error:
        raise ConfigError(f"objective.name {name!r} cannot be used with these data: {error}.") from error
