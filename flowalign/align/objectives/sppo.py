"""Self-play preference optimisation: each log-ratio is drawn to its own win probability."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference")
def sppo(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """(h_w − (p − ½)/β)² + (h_l + (p − ½)/β)² with the label p; returns `[B]`.

    A tie draws both to 0. Each picture has a target of its own, so the chosen one's likelihood cannot fall with the other's.
    β as in `dpo`: a vote draws the margin to 1/β. The loss is of the order 1/β²: use `adam_eps` 1e-15, as for `ipo`.

    Source: Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with η = 1/β.
    """
    target = (terms.preference - 0.5) / beta
    chosen, rejected = terms.sides(terms.log_ratio)
    return (chosen - target).square() + (rejected + target).square()
