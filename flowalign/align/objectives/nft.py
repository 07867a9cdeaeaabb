"""Negative-aware fine-tuning: good pictures pull the policy, bad ones push its mirror image."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference", "drift", takes="unpaired")
def nft(terms: Terms, *, step: float = 1.0) -> Tensor:
    """r‖v⁺ − v‖² + (1−r)‖v⁻ − v‖², v^± = (1∓b)·reference ± b·policy, mean over elements and pictures; returns `[B]`.

    b = `step`; r is the probability that a picture is a good one: the label p for the chosen, 1 − p for the rejected. By the
    identity of the three errors the squares are (1−b)e_ref + b·e − b(1−b)q and (1+b)e_ref − b·e + b(1+b)q. The reference stands
    where the paper has the policy that drew the pictures.

    Source: Zheng et al. 2025, arXiv 2509.16117 (DiffusionNFT), v^± from the authors' code, without its adaptive weights.
    """
    e, reference, drift, r = terms.policy_error, terms.given("reference"), terms.given("drift"), terms.wanted
    good = (1 - step) * reference + step * e - step * (1 - step) * drift
    bad = (1 + step) * reference - step * e + step * (1 + step) * drift
    return (r * good + (1 - r) * bad).mean(1)
