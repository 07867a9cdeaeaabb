"""ε-DPO: each pair's β goes a step up or down, where a slightly different policy would order it better."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, carries, needs


def start(*, beta: float, epsilon: float) -> dict[str, float]:
    """β before the first step."""
    return {"beta": beta}


def step(terms: Terms, *, epsilon: float) -> Tensor:
    """`[B]` s: +1 where both neighbours (1±ε)·policy ∓ ε·reference say that a smaller β orders the pair better, −1 a larger.

    With errors of Gaussians, m = 2Δ and D = q_w − q_l: s = +1 where m − D > ε|D|, −1 where m − D < −ε|D|, else 0.
    """
    drift = terms.gap(terms.given("drift")).detach()
    lead, least = 2 * terms.margin.detach() - drift, epsilon * drift.abs()
    return (lead > least).to(drift.dtype) - (lead < -least).to(drift.dtype)


def observe(terms: Terms, carried: Mapping[str, Tensor], *, beta: float, epsilon: float) -> dict[str, Tensor]:
    """The step of each pair, and whether it raises or lowers β, in expectation over the label."""
    up, p = step(terms, epsilon=epsilon), terms.preference
    lowered, raised = ((sign * up > 0).to(up.dtype) for sign in (1, -1))
    return {
        "step": (2 * p - 1) * up,
        "lowered": p * lowered + (1 - p) * raised,
        "raised": p * raised + (1 - p) * lowered,
    }


def advance(carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, beta: float, epsilon: float) -> dict[str, Tensor]:
    """β ← β/(1 + ε·mean s), kept within a factor of ten of where it began."""
    return {"beta": (carried["beta"] / (1 + epsilon * means["step"])).clamp(beta / 10, beta * 10)}


@carries(start=start, observe=observe, advance=advance)
@needs("reference", "drift")
def epsilon_dpo(terms: Terms, carried: Mapping[str, Tensor], *, beta: float = 2000.0, epsilon: float = 0.01) -> Tensor:
    """−log σ(β̃Δ) with β̃ = β/(1 + ε·s), s in {−1, 0, 1} by `step`, in expectation over a soft label; returns `[B]`.

    The running β starts at the knob `beta`, in the convention of `dpo`, and follows the mean s of each optimizer step.

    Source: Lee et al. 2025, arXiv 2502.13177, checked against the authors' code; the closed form for errors is derived here.
    """

    def loss(vote: Terms) -> Tensor:
        return -logsigmoid(carried["beta"] / (1 + epsilon * step(vote, epsilon=epsilon)) * vote.margin)

    return terms.over_votes(loss)
