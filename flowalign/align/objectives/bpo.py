"""Bregman preference optimisation: DPO as one of a family of likelihood-ratio estimates."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

from flowalign.align.terms import Terms, needs, tangent_exp


@needs("reference")
def bpo(terms: Terms, *, beta: float = 2000.0, generator: Literal["logistic", "basu"] = "basu", power: float = -0.5) -> Tensor:
    """f′(R)R − f(R) − f′(1/R) with R = e^{−βΔ}, in expectation over a soft label; returns `[B]`.

    `logistic` is `dpo`. `basu` is scaled Basu's power divergence, which comes to ¼[g(λ+1) + g(−λ)], g(a) = (Rᵃ − 1)/a,
    λ = `power`: all λ have the gradient of `dpo` at Δ = 0. λ strictly between −1 and 0 is bounded below under votes that all
    point one way; −½ is e^{−βΔ/2} − 1, and no published default. Powers above e²⁰ continue along their tangent. β as in `dpo`.

    Source: Kim et al. 2025, arXiv 2505.19601 (BPO).
    """

    def loss(margin: Tensor) -> Tensor:
        x = -beta * margin
        if generator == "logistic":
            return softplus(x)
        return 0.25 * (_power(x, power + 1) + _power(x, -power))

    return terms.expected(loss)


def _power(x: Tensor, a: float) -> Tensor:
    """(Rᵃ − 1)/a for x = log R; x at a = 0."""
    return x if a == 0 else (tangent_exp(a * x) - 1) / a
