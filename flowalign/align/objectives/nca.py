"""Noise-contrastive alignment: the chosen picture's likelihood is held up."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference")
def nca(terms: Terms, *, beta: float = 2000.0) -> Tensor:
    """−log σ(βh_w) − ½ log σ(−βh_w) − ½ log σ(−βh_l), in expectation over a soft label; returns `[B]`.

    Absolute log-ratios, where `dpo` only knows their difference: h_w is drawn to log 2/β and not below. β as in `dpo`.

    Source: Chen et al. 2024, arXiv 2402.05369, for one chosen and one rejected picture.
    """

    def loss(vote: Terms) -> Tensor:
        chosen, rejected = vote.sides(beta * vote.log_ratio)
        return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))

    return terms.over_votes(loss)
