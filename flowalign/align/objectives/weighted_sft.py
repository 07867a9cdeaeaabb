"""Fine-tuning on the chosen pictures, weighted by how far their scores stand out."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("scores", takes="groups")
def weighted_sft(terms: Terms) -> Tensor:
    """mean over the chosen of max(0, Â)·e, Â = (s − mean s)/std s over the comparison's pictures; returns `[B]`.

    Which pictures are chosen is the filter; the rejected ones only set the scale. Pictures that score below the mean of their
    comparison, and all where the scores are equal, teach nothing. No reference and no β. The vote is not read.

    Source: Sun et al. 2026, arXiv 2603.18991 (CRAFT), in a form of our own.
    """
    scores = terms.given("scores")
    centred = scores - scores.mean(1, keepdim=True)
    advantage = (centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)).clamp_min(0)
    return (advantage * terms.policy_error)[:, : terms.num_chosen].mean(1)
