"""Denoising ranking: good pictures must be denoised better than the policy's own samples."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference")
def dro(terms: Terms, *, slack: float = 1e-3) -> Tensor:
    """max(0, (e_w − e_ref,w) − (e_l − e_ref,l) + δ) = max(0, δ − 2Δ), δ = `slack`; returns `[B]`.

    The rejected picture is a sample of the policy itself, so only good pictures have to be collected. The vote is not read.

    Source: Wu et al. 2025, arXiv 2510.18353 (Diffusion-DRO).
    """
    return (slack - 2 * terms.margin).clamp_min(0)
