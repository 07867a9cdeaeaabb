"""What a step tells of its terms."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.align.terms import Terms


@torch.no_grad()
def measured(terms: Terms, beta: float) -> dict[str, Tensor]:
    """Rewards βh as TRL names them, and errors relative to the reference, each a mean over the chosen or the rejected.

    A tied margin is half a win, half a loss. The margin of a picture that was judged alone is its h where it is wanted, and
    −h where it is not. `winner/…` are the errors themselves, of the chosen; of pictures judged alone times the probability
    that they are wanted, so that ratios of their means are those of the wanted ones.
    """
    alone = terms.policy_error.shape[1] == 1
    parts = {"all": slice(None)} if alone else {"chosen": slice(terms.num_chosen), "rejected": slice(terms.num_chosen, None)}
    rise = terms.policy_error if terms.reference_error is None else terms.policy_error - terms.reference_error
    errors = {f"error/{name}": rise[:, part].mean(1) for name, part in parts.items()}
    share = terms.preference if alone else torch.ones_like(terms.preference)
    winners = {"winner/error": terms.policy_error, "winner/reference_error": terms.reference_error}
    errors |= {name: share * e[:, : terms.num_chosen].mean(1) for name, e in winners.items() if e is not None}
    if terms.reference_error is None:
        return errors
    reward = beta * terms.log_ratio
    margin = (2 * terms.preference - 1) * terms.log_ratio[:, 0] if alone else terms.margin
    return {
        **{f"rewards/{name}": reward[:, part].mean(1) for name, part in parts.items()},
        "rewards/margins": beta * margin,
        "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0).float(),
        **errors,
    }
