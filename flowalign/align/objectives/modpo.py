"""Multi-objective DPO: learn one preference on top of other rewards that are given."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", "scores")
def modpo(terms: Terms, *, beta: float = 2000.0, weight: float = 0.5) -> Tensor:
    """−log σ((βΔ − (s_w − s_l))/w₀), s = Σ_k w_k r_k of the other rewards, in expectation over a soft label; returns `[B]`.

    w₀ = `weight` in (0, 1] is the share of the preference that the votes tell; `scores` hold the weighted sum of the rest. With
    equal scores and w₀ = 1 it is `dpo`, whose β this is.

    Source: Zhou et al. 2023, arXiv 2310.03708.
    """
    margin = (beta * terms.margin - terms.score_margin) / weight
    return terms.expected(lambda logit: -logsigmoid(logit), margin=margin)
