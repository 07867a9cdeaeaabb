"""Reverse KL from the policy's preference to the smoothed vote."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs("reference")
def exo(terms: Terms, *, beta: float = 2000.0, label_smoothing: float = 1e-3) -> Tensor:
    """KL(Bern(q) ‖ Bern(1−ε)) with q = σ(βΔ), in expectation over a soft label; returns `[B]`.

    Where `dpo` is the forward KL and covers, this one seeks the mode. ε = `label_smoothing` in (0, 1): at 0 it is infinite.
    The margin is drawn to log((1−ε)/ε)/β. β as in `dpo`.

    Source: Ji et al. 2024, arXiv 2402.00856 (EXO), eq. 16.
    """

    def loss(margin: Tensor) -> Tensor:
        x = beta * margin
        won = x.sigmoid() * (logsigmoid(x) - math.log(1 - label_smoothing))
        return won + (-x).sigmoid() * (logsigmoid(-x) - math.log(label_smoothing))

    return terms.expected(loss)
