"""DPO whose logit is scaled by how sure two normalised scores are."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference", "scores")
def smpo(
    terms: Terms, *, beta: float = 2000.0, gain: float = 10.0, lowest: float = 0.11544, highest: float = 0.28202
) -> Tensor:
    """−log σ(γ(2p−1)·βΔ) with p = softmax(s′)_w, s′ = (s − lowest)/(highest − lowest), γ = `gain`; returns `[B]`.

    The scores are the label: where they contradict the vote, the logit changes its sign and they win. The defaults of `lowest`
    and `highest` are those of PickScore's cosine on Pick-a-Pic v2; other scores have others. β as in `dpo`.

    Source: Lu et al. 2025, arXiv 2506.02698 (SmPO), without its inversion; checked against the authors' code, which takes p
    from the first pair of a batch for all of them.
    """
    sure = gain * (terms.score_margin / (highest - lowest) / 2).tanh()  # 2p − 1, of two pictures the offset cancels
    return -logsigmoid(sure * beta * terms.margin)
