"""Anchored preference optimisation for chosen pictures that are worse than the model's own."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference")
def apo_down(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """σ(βh_w) + 1 − σ(β(h_w − h_l)), in expectation over a soft label; returns `[B]`.

    Lowers the likelihood of both pictures, and that of the rejected one more. β as in `dpo`.

    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8.
    """

    def loss(vote: Terms) -> Tensor:
        chosen, rejected = vote.sides(beta * vote.log_ratio)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()

    return terms.over_votes(loss)
