"""Whether a picture is still itself after it was changed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.errors import DataError


def nearest_is_own(before: ArrayLike, after: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Features `[n, F]` of pictures before and after -> whether each one's nearest before is its own, and the distance to it.

    Distances are 1 − cosine, of features standardised by those before. Where many are changed alike, as by a style, this is
    stricter than it seems: all of them move the same way, and may end nearer to another. Raises DataError for unequal shapes.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise DataError(f"features have shapes {first.shape} and {second.shape}; give two of one shape, a row a picture.")
    mean, spread = first.mean(0), first.std(0)
    spread[spread < 1e-12] = 1.0
    rows = []
    for features in (first, second):
        scaled = (features - mean) / spread
        rows.append(scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12))
    distance = 1 - rows[1] @ rows[0].T
    own = distance.diagonal()
    return own <= distance.min(axis=1) + 1e-12, own.copy()
