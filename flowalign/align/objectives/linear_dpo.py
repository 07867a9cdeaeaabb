"""Linear DPO: the difference of errors, weighted by a clipped line instead of a sigmoid."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference")
def linear_dpo(terms: Terms, *, beta: float = 250.0, eta: float = 1e-3) -> Tensor:
    """sg(w)(e_w − e_l) with w = clip(½ + 0.2·βD, η, 1−η), D = −2Δ, in expectation over a soft label; returns `[B]`.

    The weight carries no gradient. β as in `dpo`; the paper's best are 250 for SD 1.5 and 500 for SDXL and SD 3 medium, with
    an average of the policy as the reference.

    Source: arXiv 2605.21123 (Linear-DPO); checked against the authors' code.
    """

    def loss(vote: Terms) -> Tensor:
        weight = (0.5 - 0.4 * beta * vote.margin.detach()).clamp(eta, 1 - eta)
        return weight * vote.gap(vote.policy_error)

    return terms.over_votes(loss)
