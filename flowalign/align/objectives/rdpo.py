"""Robust DPO, unbiased when a known share of the votes is flipped."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference")
def rdpo(terms: Terms, *, beta: float = 2000.0, flips: float = 0.1) -> Tensor:
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε), in expectation over a soft label; returns `[B]`.

    ε = `flips` in [0, ½) is the share of votes that are flipped: under such votes the mean is that of `dpo` under clean ones.
    Single values may be below zero. β as in `dpo`.

    Source: Chowdhury et al. 2024, arXiv 2403.00409.
    """

    def loss(margin: Tensor) -> Tensor:
        return (flips * logsigmoid(-beta * margin) - (1 - flips) * logsigmoid(beta * margin)) / (1 - 2 * flips)

    return terms.expected(loss)
