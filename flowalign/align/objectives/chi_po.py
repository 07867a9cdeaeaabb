"""χ² preference optimisation: DPO with a link that fears large likelihood ratios."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs, tangent_exp


@needs("reference")
def chi_po(terms: Terms, *, beta: float = 2000.0, kl: float = 1.0, bound: float = 10.0) -> Tensor:
    """−log σ(clip(φ_w − φ_l, ±2R)) with φ = βh + κ e^{βh/κ}, in expectation over a soft label; returns `[B]`.

    κ = `kl` is the paper's β and βh/κ its log-ratio: our h is a mean over elements, so one factor sets the scale of the
    ratio and one that of the reward. R = `bound` is the largest reward there is; beyond 2R the gradient is 0. Not tuned.
    β as in `dpo`, but at h = 0 the slope of the link is 2β.

    Source: Huang et al. 2024, arXiv 2407.13399 (χPO), algorithm 1.
    """
    x = beta * terms.log_ratio
    link = terms.gap(x + kl * tangent_exp(x / kl)).clamp(-2 * bound, 2 * bound)
    return terms.expected(lambda margin: -logsigmoid(margin), margin=link)
