"""Best of n: draw n pictures of a prompt and keep the one that a reward likes best. What any other way must be held against."""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.errors import DataError


def best_of_weights(scores: ArrayLike, n: int) -> NDArray[np.float64]:
    """Probability `[P, N]` that a picture is the best of n drawn without replacement from the N of its prompt.

    scores: `[P, N]` of the reward that chooses, higher is better. The r-th of N from below is the best of n in C(r − 1, n − 1)
    of the C(N, n) subsets; pictures of equal scores share what belongs to them together. n = 1 gives 1/N each, n = N all to the
    best. Sums with these weights have the mean of best-of-n, and use every picture that was drawn. Raises DataError for another
    shape, a score that is not finite, and an n that is not from 1 to N.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise DataError(f"scores have shape {values.shape}; give finite ones [prompts, pictures of each], at least one.")
    total = values.shape[1]
    if not 1 <= n <= total:
        raise DataError(f"the best of {n} cannot be had from {total} pictures of a prompt; choose 1 to {total}.")
    share = np.array([comb(rank, n - 1) / comb(total, n) for rank in range(total)])
    weights = np.empty_like(values)
    for row, given in zip(weights, values, strict=True):
        _, place, count = np.unique(given, return_inverse=True, return_counts=True)
        row[:] = (np.bincount(place, weights=share[np.argsort(np.argsort(given, kind="stable"))]) / count)[place]
    return weights


def best_of(scores: ArrayLike, judged: ArrayLike, n: int) -> NDArray[np.float64]:
    """Mean of `judged` `[P, N]` over what best-of-n by `scores` `[P, N]` keeps, `[P]`. Raises DataError as above."""
    values, weights = np.asarray(judged, dtype=np.float64), best_of_weights(scores, n)
    if values.shape != weights.shape:
        raise DataError(f"scores have shape {weights.shape} and what is judged {values.shape}; give two of one shape.")
    return (weights * values).sum(1)
