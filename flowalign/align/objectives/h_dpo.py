"""DPO with control of the policy's entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference")
def h_dpo(terms: Terms, *, beta: float = 2000.0, alpha: float = 0.95) -> Tensor:
    """−log σ(β(α(l_w − l_l) − (l_ref,w − l_ref,l))) with l = −½e, in expectation over a soft label; returns `[B]`.

    α < 1 sharpens the policy, α > 1 flattens it, α = 1 is `dpo`. Away from 1 the errors of two different pictures no longer
    cancel, and β of their difference is large: stay near 1. β as in `dpo`; the default of α is not published.

    Source: Omura et al. 2024, arXiv 2411.07595.
    """
    reference = terms.gap(-0.5 * terms.given("reference"))
    return terms.expected(lambda margin: -logsigmoid(beta * margin), margin=alpha * terms.policy_margin - reference)
