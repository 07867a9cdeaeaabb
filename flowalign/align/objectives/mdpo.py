"""DPO between groups: several chosen against several rejected pictures of a prompt."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", takes="groups")
def mdpo(terms: Terms, *, beta: float = 2000.0, nll: float = 0.0) -> Tensor:
    """−log σ(β(mean h_w − mean h_l)) + λ·½ mean e_w, in expectation over a soft label; returns `[B]`.

    λ = `nll` adds the chosen pictures' own errors. One chosen and one rejected picture with λ = 0 is `dpo`, whose β this is.

    Source: Wang et al. 2024, arXiv 2410.12138 (multi-sample DPO).
    """

    def loss(vote: Terms) -> Tensor:
        return -logsigmoid(beta * vote.margin) - nll * vote.sides(vote.log_likelihood)[0]

    return terms.over_votes(loss)
