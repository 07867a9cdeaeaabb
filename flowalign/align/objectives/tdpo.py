"""Token-level DPO's second form for denoisers: hold the rejected picture's KL at the chosen one's."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", "drift")
def tdpo(terms: Terms, *, beta: float = 2000.0, alpha: float = 0.5) -> Tensor:
    """−log σ(β(Δ − α·½(q_l − sg(q_w)))), in expectation over a soft label; returns `[B]`.

    ½q is the KL divergence of the two Gaussians of which h is the log-ratio, so it stands where the paper has the sum of
    KLs over tokens; sg stops the gradient. α = 0 is `dpo`. β as in `dpo`.

    Source: Zeng et al. 2024, arXiv 2404.11999 (TDPO₂); checked against the authors' code.
    """

    def loss(vote: Terms) -> Tensor:
        chosen, rejected = vote.sides(vote.given("drift"))
        return -logsigmoid(beta * (vote.margin - alpha * 0.5 * (rejected - chosen.detach())))

    return terms.over_votes(loss)
