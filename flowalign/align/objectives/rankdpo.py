"""DPO over the pairs of a ranked list, each weighted by what its exchange costs in DCG."""

from __future__ import annotations

from torch import Tensor, where
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", "grades", takes="lists")
def rankdpo(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """−Σ over g_i > g_j of |G_i − G_j|·|1/D_i − 1/D_j|·log σ(β(h_i − h_j)); returns `[B]`.

    Gain G = 2^g − 1 of the grade g, discount D = log(1 + rank), rank 1 for the largest h, equal ones in the list's order;
    ranks carry no gradient. Pictures of one grade are not compared. The vote is not read. β as in `dpo`.

    Source: Karthik et al. 2024, arXiv 2410.18013 (RankDPO), eq. 5 to 7; the same weights as LiPO-λ, arXiv 2402.01878.
    """
    h, grades = terms.log_ratio, terms.given("grades")
    rank = h.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    gain, discount = 2**grades - 1, 1 / (1 + rank).to(h.dtype).log()
    weight = (gain[:, :, None] - gain[:, None]).abs() * (discount[:, :, None] - discount[:, None]).abs()
    better = grades[:, :, None] > grades[:, None]
    loss = -logsigmoid(beta * (h[:, :, None] - h[:, None]))
    return where(better, weight * loss, 0.0).sum((1, 2))
