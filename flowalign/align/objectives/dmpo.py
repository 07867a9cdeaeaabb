"""Divergence minimisation: the reverse KL of `exo` as it was proposed for diffusion models."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.objectives.exo import exo
from flowalign.align.terms import Terms, needs


@needs("reference")
def dmpo(terms: Terms, *, beta: float = 2000.0, alpha: float = 0.01) -> Tensor:
    """KL(Bern(σ(βΔ)) ‖ Bern(1−α)), in expectation over a soft label; returns `[B]`.

    α in (0, 1). The same function as `exo`, with the defaults of the paper: β 2000 for SD 1.5 and 6000 for SDXL, as in `dpo`.

    Source: Li et al. 2025, arXiv 2507.07510.
    """
    return exo(terms, beta=beta, label_smoothing=alpha)
