"""Ordinal preference optimisation: a smooth NDCG of a ranked list."""

from __future__ import annotations

from torch import Tensor, arange

from flowalign.align.terms import Terms, needs


@needs("reference", "grades", takes="lists")
def opo(terms: Terms, *, beta: float = 2000.0, temperature: float = 1.0) -> Tensor:
    """−(Σ_i G_i/log₂(1 + r_i)) / ideal, r_i = 1 + Σ_{j≠i} σ((s_j − s_i)/T), s = βh; returns `[B]`.

    Gain G = 2^g − 1 of the grade g; the ideal is the sum for the ranks that the grades give. T = `temperature`: small ones
    make r the true rank. Between −1 and 0; 0 where no picture has a grade above 0. The vote is not read. β as in `dpo`.

    Source: Zhao et al. 2024, arXiv 2410.04346 (OPO), with ApproxNDCG (Qin et al. 2010) for the ranks.
    """
    scores, gain = beta * terms.log_ratio / temperature, 2 ** terms.given("grades") - 1
    ahead = (scores[:, None] - scores[:, :, None]).sigmoid()  # [b, i, j]: j before i; j = i counts ½
    rank = 0.5 + ahead.sum(2)
    place = arange(gain.shape[1], device=gain.device, dtype=gain.dtype)
    ideal = (gain.sort(dim=1, descending=True).values / (2 + place).log2()).sum(1)
    return -(gain / (1 + rank).log2()).sum(1) / ideal.clamp_min(1e-12)
