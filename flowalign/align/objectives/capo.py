"""Calibrated preference optimisation: regress the margin onto the difference of calibrated rewards."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference", "scores")
def capo(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """(s_w − s_l − β·2Δ)², s a calibrated reward such as an expected win rate; returns `[B]`.

    The scores are the label: the vote is not read. Where all differences are the same s it is 4β² times `ipo` with τ = β/s.
    β as in `dpo`.

    Source: Lee et al. 2025, arXiv 2502.02588 (CaPO).
    """
    return (terms.score_margin - 2 * beta * terms.margin).square()
