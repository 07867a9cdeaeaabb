"""Plackett-Luce over a ranked list, with soft choices where grades are close."""

from __future__ import annotations

from torch import Tensor, ones
from torch.nn.functional import log_softmax

from flowalign.align.terms import Terms, needs


@needs("reference", "grades", takes="lists")
def plackett_luce(terms: Terms, *, beta: float = 2000.0, tau: float = 0.05, nll: float = 0.5) -> Tensor:
    """Σ_i [logsumexp_{m≥i} s_m − Σ_{j≥i} q_i(j) s_j] + γ·e_1, s = βh, q_i = softmax_{j≥i}(g/τ); returns `[B]`.

    Pictures in the list's order, best first: at each place the policy's choice among the rest is compared with that of the
    grades g. τ → 0 is the Plackett-Luce likelihood of the order, and for two pictures `dpo`, whose β this is. γ = `nll` adds
    the best picture's own error. The vote is not read.

    Source: Plackett-Luce DPO in arXiv 2305.18290, appendix A.3, with the softened targets of arXiv 2601.02036 (GDRO).
    """
    scores, grades = beta * terms.log_ratio, terms.given("grades")
    count = scores.shape[1]
    past = ones(count, count, dtype=scores.dtype, device=scores.device).tril(-1).bool()
    gone = scores.new_tensor(-1e30)  # not −∞: its softmax is 0 as well, and 0·(−∞) is no number
    chosen = log_softmax(scores[:, None].where(~past, gone), 2)
    wanted = (grades[:, None] / tau).where(~past, gone).softmax(2)
    loss = -(wanted * chosen.where(~past, 0.0)).sum((1, 2))
    return loss + nll * terms.policy_error[:, 0]
