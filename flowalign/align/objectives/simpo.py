"""SimPO: DPO without a reference, with a margin to win by."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs()
def simpo(terms: Terms, *, beta: float = 2000.0, gamma: float = 1.0) -> Tensor:
    """−log σ(β(l_w − l_l) − γ) with l = −½e, in expectation over a soft label; returns `[B]`.

    Errors are means over elements, which is the paper's division by length. Two pictures differ in e far more than a policy
    does from its reference, so β saturates sooner here than in `dpo`, whose convention it has. γ is in units of the logit.

    Source: Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """
    return terms.expected(lambda margin: -logsigmoid(beta * margin - gamma), margin=terms.policy_margin)
