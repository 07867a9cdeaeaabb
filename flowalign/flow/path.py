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
    """Permutation p `[n]` int64 on the CPU with the least Σ_i cost[i, p_i], for a square `[n, n]`. Exact.

    Shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987; Crouse 2016), O(n³): the rows enter one after the other,
    and each re-assigns those before it along the path that adds the least.
    """
    costs: NDArray[np.float64] = cost.detach().cpu().double().numpy()
    n = len(costs)
    u = costs.min(axis=1)
    v = (costs - u[:, None]).min(axis=0)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    for row, column in zip(*np.nonzero(costs - u[:, None] - v == 0), strict=True):  # what needs no path
        if column_of[row] < 0 and row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    for first in np.flatnonzero(column_of < 0):
        # The way to each column: `reach` while it may still shorten, then `length`; closed columns are never shortened.
        reach, bound = np.full(n, np.inf), np.full(n, np.inf)
        before, length = np.full(n, -1), np.zeros(n)
        rows, columns = [int(first)], list[int]()
        row, lowest = int(first), 0.0
        while True:
            found = costs[row] - v + (lowest - u[row])
            shorter = np.flatnonzero(found < bound)
            reach[shorter] = bound[shorter] = found[shorter]
            before[shorter] = row
            column = int(reach.argmin())
            lowest = length[column] = float(reach[column])
            reach[column], bound[column] = np.inf, -np.inf
            columns.append(column)
            row = int(row_of[column])
            if row < 0:
                break
            rows.append(row)
        u[first] += lowest
        u[rows[1:]] += lowest - length[column_of[rows[1:]]]
        v[columns] -= lowest - length[columns]
        while True:
            row = int(before[column])
            row_of[column] = row
            column_of[row], column = column, int(column_of[row])
            if row == first:
                break
    return torch.from_numpy(column_of.astype(np.int64))
