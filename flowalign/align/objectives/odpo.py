"""DPO with an offset: pairs whose rewards lie further apart must be told further apart."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", "scores")
def odpo(terms: Terms, *, beta: float = 2000.0, alpha: float = 1.0) -> Tensor:
    """−log σ(βΔ − α log(r_w − r_l)), in expectation over a soft label; returns `[B]`.

    A gap of scores of 1 is `dpo`. Gaps below 1e-6, also those of a vote against the scores, count as 1e-6: the offset is then
    so low that the pair teaches nothing. β as in `dpo`; α is a factor on the units of the scores' logarithm.

    Source: Amini et al. 2024, arXiv 2402.10571 with f = log; checked against the authors' code.
    """

    def loss(vote: Terms) -> Tensor:
        return -logsigmoid(beta * vote.margin - alpha * vote.score_margin.clamp_min(1e-6).log())

    return terms.over_votes(loss)
