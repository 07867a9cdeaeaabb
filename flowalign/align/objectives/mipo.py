"""IPO between groups, without the bias that the groups' own variance brings."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference", takes="groups")
def mipo(terms: Terms, *, tau: float = 2000.0, estimator: Literal["unbiased", "plug_in"] = "unbiased") -> Tensor:
    """(mean h_w − mean h_l − 1/(2τ))² − s²_w/m_w − s²_l/m_l, in expectation over a soft label; returns `[B]`.

    s² are variances within a group with m − 1 in the denominator, so that the loss is an unbiased estimate of the squared
    distance of the expected margin; it may be below zero. `plug_in` leaves them out. τ as in `ipo`.

    Raises ValueError where a group has only one picture and the estimator is `unbiased`.

    Source: Wang et al. 2024, arXiv 2410.12138 (multi-sample IPO).
    """
    loss = terms.expected(lambda margin: (margin - 1 / (2 * tau)).square())
    if estimator == "plug_in":
        return loss
    k, count = terms.num_chosen, terms.policy_error.shape[1]
    if min(k, count - k) < 2:
        raise ValueError(f"mipo's unbiased estimator needs 2 pictures on either side, and here are {k} and {count - k}")
    h = terms.log_ratio
    return loss - h[:, :k].var(1) / k - h[:, k:].var(1) / (count - k)
