"""α-DPO: SimPO whose margin to win by follows the pair's normalised implicit reward."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, carries, needs, running_moments


def start(*, beta: float, gamma: float, alpha: float, decay: float) -> dict[str, float]:
    """Mean and deviation of the rewards' margin before the first step."""
    return {"mean": 0.0, "deviation": 1.0}


def observe(
    terms: Terms, carried: Mapping[str, Tensor], *, beta: float, gamma: float, alpha: float, decay: float
) -> dict[str, Tensor]:
    """Moments of βΔ, in expectation over a soft label."""
    reward = beta * terms.margin.detach()
    return {"reward": terms.expected(lambda margin: margin, margin=reward), "square": reward.square()}


def advance(
    carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, beta: float, gamma: float, alpha: float, decay: float
) -> dict[str, Tensor]:
    """Running mean and deviation."""
    return running_moments(carried, means, decay)


@carries(start=start, observe=observe, advance=advance)
@needs("reference")
def alpha_dpo(
    terms: Terms,
    carried: Mapping[str, Tensor],
    *,
    beta: float = 2000.0,
    gamma: float = 1.0,
    alpha: float = 0.1,
    decay: float = 0.9,
) -> Tensor:
    """−log σ(β(l_w − l_l) − sg[γ + α·z]), z = (βΔ − mean)/deviation, l = −½e, in expectation over a soft label; returns `[B]`.

    Mean and deviation are running ones over the steps before (the authors' include the present one). α = 0 is `simpo`, with
    what is said there of β. The paper's β of 2.5 and 10 are for length-normalised text; its code multiplies γ and α by β too.

    Source: Wu et al. 2024, arXiv 2410.10148 (α-DPO); checked against the authors' code.
    """

    def loss(vote: Terms, sign: float) -> Tensor:
        z = (beta * vote.margin.detach() - sign * carried["mean"]) / carried["deviation"].clamp_min(1e-6)
        return -logsigmoid(beta * vote.policy_margin - gamma - alpha * z)

    p = terms.preference
    return p * loss(terms, 1.0) + (1 - p) * loss(terms.swapped(), -1.0)
