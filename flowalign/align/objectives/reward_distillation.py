"""Reward distillation: the implicit reward of a pair is drawn to the difference of its explicit ones."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference", "scores")
def reward_distillation(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """(r_w − r_l − βΔ)², r in units of log-odds; returns `[B]`.

    The scores are the label: the vote is not read. Its minimum is where `dpo` would be under labels σ(r_w − r_l), without
    running away from votes that all point one way. β as in `dpo`.

    Source: Fisch et al. 2024, arXiv 2405.19316, the objective without pessimism.
    """
    return (terms.score_margin - beta * terms.margin).square()
