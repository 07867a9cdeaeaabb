"""Kahneman-Tversky optimisation: each picture is wanted or not, without a partner."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flowalign.align.terms import Terms, carries, needs


def start(*, beta: float, desirable: float, undesirable: float) -> dict[str, float]:
    """The reference point before the first step."""
    return {"z0": 0.0}


def observe(
    terms: Terms, carried: Mapping[str, Tensor], *, beta: float, desirable: float, undesirable: float
) -> dict[str, Tensor]:
    """Mean h of the pictures."""
    return {"log_ratio": terms.log_ratio.detach().mean(1)}


def advance(
    carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, beta: float, desirable: float, undesirable: float
) -> dict[str, Tensor]:
    """z₀ = max(0, mean h)."""
    return {"z0": means["log_ratio"].clamp_min(0)}


@carries(start=start, observe=observe, advance=advance)
@needs("reference", takes="unpaired")
def kto(
    terms: Terms, carried: Mapping[str, Tensor], *, beta: float = 2000.0, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """λ_D(1 − σ(β(h − z₀))) for wanted pictures, λ_U(1 − σ(β(z₀ − h))) for others, mean over pictures; returns `[B]`.

    A picture is wanted with the label's probability p, a rejected one of a pair with 1 − p; the loss is the expectation. z₀,
    the paper's KL divergence of policy and reference, is max(0, mean h) of the optimizer step before. λ_D = `desirable` and
    λ_U = `undesirable` balance the two kinds. β as in `dpo`.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306; for diffusion Li et al. 2024, arXiv 2404.04465.
    """
    x, p = beta * (terms.log_ratio - carried["z0"]), terms.wanted
    return (p * desirable * (-x).sigmoid() + (1 - p) * undesirable * x.sigmoid()).mean(1)
