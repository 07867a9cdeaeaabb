"""Direct score preference optimisation: the chosen picture's score, corrected by how far it is preferred."""

from __future__ import annotations

from torch import Tensor

from flowalign.align.terms import Terms, needs


@needs("reference", "drift")
def dspo(terms: Terms, *, beta: float = 2000.0, weight: float = 1e-3) -> Tensor:
    """mean ‖(prediction_w − target) − κ(prediction_w − reference_w)‖², κ = β′(1 − σ(βΔ)); returns `[B]`.

    In expectation over a soft label. By the identity of the three errors it is e − κ(e + q − e_ref) + κ²q of the chosen
    picture. κ carries no gradient, so the rejected one matters through κ alone. β′ = `weight`; β as in `dpo`.

    Source: Zhu et al. 2025 (DSPO), ICLR; in the authors' code β′ and β are one number and κ keeps its gradient.
    """

    def loss(vote: Terms) -> Tensor:
        kappa = weight * (-beta * vote.margin.detach()).sigmoid()
        error, reference, drift = (vote.sides(vote.given(name))[0] for name in ("policy_error", "reference", "drift"))
        return error - kappa * (error + drift - reference) + kappa.square() * drift

    return terms.over_votes(loss)
