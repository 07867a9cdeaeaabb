"""ReLU-based preference optimisation: SimPO's limit of large β."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs()
def repo(terms: Terms, *, gamma: float = 5e-4) -> Tensor:
    """max(0, γ − (l_w − l_l)) with l = −½e, in expectation over a soft label; returns `[B]`.

    Pairs that are won by more than γ, a difference of halved mean errors, teach nothing more. The default is not published: it
    is the 1/β of `hinge`.

    Source: Wu et al. 2025, arXiv 2503.07426.
    """
    return terms.expected(lambda margin: (gamma - margin).clamp_min(0), margin=terms.policy_margin)
