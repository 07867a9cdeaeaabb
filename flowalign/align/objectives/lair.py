"""Listwise reward-aware alignment: a regression of log-ratios onto centred advantages."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference", "grades", takes="lists")
def lair(terms: Terms, *, beta: float = 2000.0, tau: float = 1.0) -> Tensor:
    """−Σ_i A_i s_i + ½ Σ_i s_i², s = βh, A = softmax(g/τ) − 1/N over the list; returns `[B]`.

    The minimum is at βh = A, bounded whatever the grades g. It is β times −ΣA h + (λ/2)Σh² with λ = β, as in `dpo`. The vote is
    not read.

    Source: Wang et al. 2026, arXiv 2605.26491 (Diffusion LAIR): written after its abstract.
    """
    grades, s = terms.given("grades"), beta * terms.log_ratio
    advantage = (grades / tau).softmax(1) - 1 / grades.shape[1]
    return (0.5 * s.square() - advantage * s).sum(1)
