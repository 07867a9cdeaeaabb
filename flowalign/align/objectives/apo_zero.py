"""Anchored preference optimisation for chosen pictures that are better than the model's own."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference")
def apo_zero(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """1 − σ(βh_w) + σ(βh_l), in expectation over a soft label; returns `[B]`.

    Raises the likelihood of the chosen picture and lowers that of the rejected one, each by itself. β as in `dpo`.

    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7.
    """

    def loss(vote: Terms) -> Tensor:
        chosen, rejected = vote.sides(beta * vote.log_ratio)
        return (-chosen).sigmoid() + rejected.sigmoid()

    return terms.over_votes(loss)
