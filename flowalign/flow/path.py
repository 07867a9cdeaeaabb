"""The straight path of preference flow matching from a rejected to a chosen output, and who is joined with whom.

Kim et al. 2024, arXiv 2405.19806: y_s = (1 − s) y⁻ + s y⁺ + σ z, and the field is trained to be u = y⁺ − y⁻ there. The
couplings `independent` and `ot` are those of Tong et al. 2023, arXiv 2302.00482.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flowalign.errors import ConfigError, allowed


def point(rejected: Tensor, chosen: Tensor, s: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """y_s = (1 − s) y⁻ + s y⁺ + σ z, `[B, ...]`, at times s `[B]` in [0, 1]: 0 rejected, 1 chosen."""
    s = wide(s, rejected)
    return (1 - s) * rejected + s * chosen + sigma * noise


def target(rejected: Tensor, chosen: Tensor) -> Tensor:
    """u = y⁺ − y⁻, `[B, ...]`: the velocity of that path, the same at all times."""
    return chosen - rejected


def wide(s: Tensor, like: Tensor) -> Tensor:
    """One number per row `[B]` -> `[B, 1, ...]`, in the dtype of `like` and on its device."""
    return s.to(like).view(-1, *[1] * (like.dim() - 1))


def paired(rejected: Tensor, chosen: Tensor, contexts: Tensor, order: Tensor) -> Tensor:
    """The given pairs."""
    return torch.arange(len(chosen))


def independent(rejected: Tensor, chosen: Tensor, contexts: Tensor, order: Tensor) -> Tensor:
    """Any rejected output with any chosen one, across contexts."""
    return order.argsort(stable=True)


def ot(rejected: Tensor, chosen: Tensor, contexts: Tensor, order: Tensor) -> Tensor:
    """The pairs whose squared distances sum to the least, across contexts."""
    return assignment(squared_distances(chosen, rejected))


def ot_per_context(rejected: Tensor, chosen: Tensor, contexts: Tensor, order: Tensor) -> Tensor:
    """The same, each output staying in its context."""
    partner = torch.arange(len(chosen))
    for context in contexts.unique():
        rows = (contexts == context).nonzero()[:, 0]
        if len(rows) > 1:
            partner[rows] = rows[assignment(squared_distances(chosen[rows], rejected[rows]))]
    return partner


Coupling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
COUPLINGS: dict[str, Coupling] = {
    "paired": paired,
    "independent": independent,
    "ot": ot,
    "ot_per_context": ot_per_context,
}


def couple(coupling: str, rejected: Tensor, chosen: Tensor, contexts: Tensor, order: Tensor) -> Tensor:
    """For each chosen output the place of the rejected one that it is joined with, `[B]` int64 on the CPU, a permutation.

    coupling: a name in `COUPLINGS`. rejected, chosen: `[B, ...]`. contexts: `[B]` integers on the CPU, equal where contexts
    are. order: `[B]` random numbers, which `independent` sorts by. A context stays with its chosen output. No output is lost
    and none is used twice. Raises ConfigError for an unknown name.
    """
    if coupling not in COUPLINGS:
        raise ConfigError(f"coupling {coupling!r} is unknown; {allowed(coupling, COUPLINGS)}.")
    return COUPLINGS[coupling](rejected, chosen, contexts, order)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² `[m, n]`, float64, of rows of any shape."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_min(0)


def assignment(cost: Tensor) -> Tensor:
    """Permutation p `[n]` int64 on the CPU with the least Σ_i cost[i, p_i], for a square `[n, n]`. Exact (Crouse 2016)."""
    return torch.from_numpy(linear_sum_assignment(cost.detach().cpu().double().numpy())[1])
