"""Margin-aware preference optimisation: no reference, the odds of two errors."""

from __future__ import annotations

from torch import Tensor, where
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, needs


@needs()
def mapo(terms: Terms, *, weight: float = 0.1, scale: float = 0.5, steps: float = 1000.0) -> Tensor:
    """e_w − b log σ(T(φ(e_w) − φ(e_l))) with φ(x) = s·x/(e^{s·x} − 1), in expectation over a soft label; returns `[B]`.

    b = `weight`, s = `scale`, and T = `steps`, the length of the noise schedule. No reference and no β: φ falls from 1 at 0.

    Source: Hong et al. 2024, arXiv 2406.06424 (MaPO); formula and defaults from the authors' code.
    """

    def loss(vote: Terms) -> Tensor:
        odds = vote.gap(_odds(scale * vote.policy_error))
        return vote.sides(vote.policy_error)[0] - weight * logsigmoid(steps * odds)

    return terms.over_votes(loss)


def _odds(z: Tensor) -> Tensor:
    """z/(eᶻ − 1) for z ≥ 0; by its series near 0, where it is 0/0."""
    near = z < 1e-3
    far = where(near, 1.0, z)
    return where(near, 1 - z / 2 + z.square() / 12, far * (-far).exp() / -(-far).expm1())
