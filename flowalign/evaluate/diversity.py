"""How different from each other the pictures are that a generator draws for one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.errors import DataError


def pairwise_distance(embeddings: ArrayLike, groups: Sequence[object]) -> NDArray[np.float64]:
    """Mean cosine distance between all pairs of pictures of a group, `[G]` in the order of first occurrence, each in [0, 2].

    embeddings: `[n, d]`, one row a picture, centred by whoever made them: features that share a large mean are all alike.
    groups: `[n]`, the prompt of each. Raises DataError for other shapes, and for a group of one picture.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(groups) or not len(rows):
        raise DataError(f"embeddings have shape {rows.shape} for {len(groups)} pictures; give one row for each, at least 1.")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    members: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    out = []
    for group, places in members.items():
        count = len(places)
        if count < 2:
            raise DataError(f"there is one picture of {group!r}; draw it from two seeds or more to see how they differ.")
        similar = unit[places] @ unit[places].T
        out.append(1 - (similar.sum() - np.trace(similar)) / (count * (count - 1)))
    return np.array(out)
