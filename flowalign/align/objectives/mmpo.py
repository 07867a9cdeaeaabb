"""DPO with labels that two scores give: matching the quality margin of a pair."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", "scores")
def mmpo(terms: Terms, *, beta: float = 2000.0, gain: float = 2.2) -> Tensor:
    """−p log σ(βΔ) − (1−p) log σ(−βΔ) with p = σ(b (s_w − s_l)), b = `gain`; returns `[B]`.

    The scores are the label: the vote is not read. β as in `dpo`.

    Source: Kim et al. 2024, arXiv 2410.03145.
    """
    p = (gain * terms.score_margin).sigmoid()
    return terms.expected(lambda margin: -logsigmoid(beta * margin), p)
