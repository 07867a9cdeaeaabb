"""DPO over all pairs of a chosen and a rejected picture: what comparing groups is measured against."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", takes="groups")
def all_pairs(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """mean over i, j of −log σ(β(h_w,i − h_l,j)), in expectation over a soft label; returns `[B]`.

    By convexity never below `mdpo`, and the same for one chosen and one rejected picture. β as in `dpo`.
    """
    h, k = beta * terms.log_ratio, terms.num_chosen
    margins = (h[:, :k, None] - h[:, None, k:]).flatten(1)
    p = terms.preference[:, None]
    return -(p * logsigmoid(margins) + (1 - p) * logsigmoid(-margins)).mean(1)
