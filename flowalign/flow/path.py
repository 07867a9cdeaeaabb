"""The straight path of preference flow matching from a rejected to a chosen output, and who is joined with whom.

Kim et al. 2024, arXiv 2405.19806: y_s = (1 − s) y⁻ + s y⁺ + σ z, and the field is trained to be u = y⁺ − y⁻ there. The
couplings `independent` and `ot` are those of Tong et al. 2023, arXiv 2302.00482.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Permutation p `[n]` int64 on the CPU with the least Σ_i cost[i, p_i], for a square `[n, n]`. Exact and without randomness.

    Shortest augmenting paths (Kuhn 1955, Jonker and Volgenant 1987), O(n³): the rows enter one after the other, and each
    re-assigns those before it along the path that adds the least.
    """
    costs: NDArray[np.float64] = cost.detach().cpu().double().numpy()
    n = len(costs)
    # Row potentials u, column potentials v; owner[j] is the row that holds column j. Column n is where a new row stands.
    u, v = np.zeros(n), np.zeros(n + 1)
    owner = np.full(n + 1, -1)
    for row in range(n):
        owner[n], column = row, n
        shortest, before = np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, dtype=bool)
        while owner[column] >= 0:
            done[column] = True
            reduced = costs[owner[column]] - u[owner[column]] - v[:n]
            better = ~done[:n] & (reduced < shortest)
            shortest[better], before[better] = reduced[better], column
            open_ = np.where(done[:n], np.inf, shortest)
            column = int(open_.argmin())
            step = open_[column]
            u[owner[done]] += step
            v[done] -= step
            shortest[~done[:n]] -= step
        while column != n:
            owner[column] = owner[before[column]]
            column = int(before[column])
    partner = np.empty(n, dtype=np.int64)
    partner[owner[:n]] = np.arange(n)
    return torch.from_numpy(partner)
