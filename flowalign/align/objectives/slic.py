"""Hinge loss on the policy's own errors, with a pull towards the chosen picture."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs()
def slic(terms: Terms, *, delta: float = 5e-4, weight: float = 0.1) -> Tensor:
    """max(0, δ − (l_w − l_l)) + λ·½e_w with l = −½e, in expectation over a soft label; returns `[B]`.

    No reference: λ = `weight` keeps the policy near the pictures instead. δ is a difference of halved mean errors; neither
    default is published, δ is the 1/β of `hinge`. With a reference it is `hinge`.

    Source: Zhao et al. 2023, arXiv 2305.10425 (SLiC-HF), eq. 1, with the chosen picture as the target of the second term.
    """

    def loss(vote: Terms) -> Tensor:
        chosen, rejected = vote.sides(vote.log_likelihood)
        return (delta - (chosen - rejected)).clamp_min(0) - weight * chosen

    return terms.over_votes(loss)
