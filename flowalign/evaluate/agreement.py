"""How far rewards agree: rank correlation over all pictures and within prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.errors import DataError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Spearman's ρ between every two of K rewards; NaN where there is none, as of constant scores."""

    pooled: Array
    """`[K, K]` over all pictures that both scored."""
    within: Array
    """`[K, K]` mean over prompts of ρ among the prompt's own pictures, every prompt counting alike."""
    prompts: NDArray[np.int64]
    """`[K, K]` prompts in that mean: those with two pictures or more of which neither reward says all are equal."""


def ranks(values: ArrayLike, groups: NDArray[np.int64]) -> Array:
    """Ranks `[n]` within each group, from 1, equal values sharing their mean rank. `groups` `[n]` are numbers of groups."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return values
    order = np.lexsort((values, groups))
    group, value = groups[order], values[order]
    opens = np.concatenate([[True], group[1:] != group[:-1]])
    differs = opens | np.concatenate([[True], value[1:] != value[:-1]])
    start = np.flatnonzero(opens)[np.cumsum(opens) - 1]
    first = np.flatnonzero(differs)
    last = np.concatenate([first[1:], [len(values)]]) - 1
    out = np.empty(len(values))
    out[order] = ((first + last) / 2)[np.cumsum(differs) - 1] - start + 1
    return out


def spearman(a: ArrayLike, b: ArrayLike, groups: ArrayLike | None = None) -> Array:
    """Spearman's ρ of two score vectors `[n]` in each group -> `[G]`, groups by number; NaN for constant or single scores.

    Spearman 1904: the correlation of ranks. Without `groups` all are one. Raises DataError for unequal lengths and for scores
    that are not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError(f"scores have shapes {a.shape} and {b.shape}; give two vectors of finite numbers, one length.")
    group = np.zeros(len(a), dtype=np.int64) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if not len(a):
        return np.full(1 if groups is None else 0, np.nan)

    def total(values: Array) -> Array:
        return np.bincount(group, weights=values)

    count = np.bincount(group)
    # Ranks of a group of n have mean (n + 1)/2, ties or not.
    x, y = (ranks(each, group) - (count[group] + 1) / 2 for each in (a, b))
    spread = np.sqrt(total(x * x) * total(y * y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, np.clip(total(x * y) / spread, -1, 1), np.nan)


def agreement(scores: ArrayLike, groups: ArrayLike) -> Agreement:
    """Scores `[n, K]`, higher is better, NaN where there is none, and the prompt of each `[n]` -> how K rewards agree."""
    scores, group = np.asarray(scores, dtype=np.float64), np.unique(np.asarray(groups), return_inverse=True)[1]
    size = scores.shape[1]
    pooled, within = np.full((size, size), np.nan), np.full((size, size), np.nan)
    prompts = np.zeros((size, size), dtype=np.int64)
    for i in range(size):
        for j in range(i, size):
            known = ~np.isnan(scores[:, i]) & ~np.isnan(scores[:, j])
            a, b = scores[known, i], scores[known, j]
            pooled[i, j] = pooled[j, i] = spearman(a, b)[0]
            each = spearman(a, b, group[known])
            each = each[~np.isnan(each)]
            prompts[i, j] = prompts[j, i] = len(each)
            within[i, j] = within[j, i] = each.mean() if len(each) else np.nan
    return Agreement(pooled, within, prompts)
