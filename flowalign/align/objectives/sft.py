"""Plain fine-tuning: the denoising error of every picture, whoever was preferred."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs(takes="groups")
def sft(terms: Terms) -> Tensor:
    """mean e over all pictures of the comparison; returns `[B]`.

    For a policy that is told each picture's own scores, it learns what pictures of such scores look like (`steer.condition:
    scores`). No reference and no β. Neither the vote nor which pictures are chosen is read.

    Source: Yang et al. 2024, arXiv 2402.10207 (RiC), for images.
    """
    return terms.policy_error.mean(1)
