"""What any objective can be combined with: pure functions of errors, dots and noise levels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowalign.align.terms import Terms
from flowalign.families.base import Level
from flowalign.settings import Switches

TINY = 1e-12


def reads(switches: Switches) -> frozenset[str]:
    """What of `terms.NEEDS` they read, whatever the objective does."""
    used = {"residual_dot": switches.safeguard is not None, "scores": switches.pair_scale == "gap"}
    return frozenset(name for name, use in used.items() if use)


def by_gap(terms: Terms) -> Terms:
    """The terms with every error of a pair times 2σ(r_w − r_l) − 1, so that an objective sees that many times Δ.

    The score of the chosen picture is r_w. A vote against the scores counts 0 times: it teaches nothing.

    Source: PNAPO, which weighs β so; its other factor is `adaptive`'s cosine.
    """
    scale = (2 * torch.sigmoid(terms.score_margin) - 1).clamp_min(0)
    names = ("policy_error", "reference_error", "drift", "residual_dot")
    held = {name: value for name in names if (value := getattr(terms, name)) is not None}
    return replace(terms, **{name: scale.view(-1, *[1] * (value.dim() - 1)) * value for name, value in held.items()})


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
