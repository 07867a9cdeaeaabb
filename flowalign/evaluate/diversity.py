"""How different from each other the pictures are that a generator draws for one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.errors import DataError


def pairwise_distance(embeddings: ArrayLike, groups: Sequence[object]) -> NDArray[np.float64]:
    """Mean cosine distance between all pairs of pictures of a group, `[G]` in the order of first occurrence, each in [0, 2].

    embeddings: `[n, d]`, one row a picture, centred by whoever made them: features that share a large mean are all alike.
    groups: `[n]`, the prompt of each. Raises DataError for other shapes, and for a group of one picture.
    """
    out = []
    for unit in _units(embeddings, groups):
        count = len(unit)
        similar = unit @ unit.T
        out.append(1 - (similar.sum() - np.trace(similar)) / (count * (count - 1)))
    return np.array(out)


def vendi_score(embeddings: ArrayLike, groups: Sequence[object]) -> NDArray[np.float64]:
    """How many different pictures a group holds in effect, `[G]` in the order of first occurrence, each in [1, its pictures].

    exp of the Shannon entropy of the eigenvalues of K/n, K the cosine similarities of n pictures: 1 for equal pictures, n for
    orthogonal ones. Arguments and errors are those of `pairwise_distance`.

    Source: Friedman and Dieng 2023, arXiv 2210.02410, definition 3.1.
    """
    return np.array([vendi_of_kernel(unit @ unit.T) for unit in _units(embeddings, groups)])


def vendi_of_kernel(similarity: ArrayLike) -> float:
    """The Vendi score of a positive semidefinite similarity matrix `[n, n]` with ones on its diagonal, in [1, n].

    Raises DataError for other shapes, other diagonals, or a matrix that is not symmetric.
    """
    kernel = np.asarray(similarity, dtype=np.float64)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not len(kernel):
        raise DataError(f"the similarities have shape {kernel.shape}; give a square matrix of at least one picture.")
    if not (np.allclose(np.diag(kernel), 1, atol=1e-6) and np.allclose(kernel, kernel.T, atol=1e-6)):
        raise DataError("the similarities are not symmetric with ones on the diagonal; give cosines of unit embeddings.")
    share = np.linalg.eigvalsh(kernel / len(kernel))
    share = share[share > 0]  # what rounding leaves below zero counts nothing, as 0 log 0
    return float(np.exp(-(share * np.log(share)).sum()))


def _units(embeddings: ArrayLike, groups: Sequence[object]) -> Iterator[NDArray[np.float64]]:
    """Unit embeddings `[n, d]` of each group, two or more. Raises DataError."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(groups) or not len(rows):
        raise DataError(f"embeddings have shape {rows.shape} for {len(groups)} pictures; give one row for each, at least 1.")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    members: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    for group, places in members.items():
        if len(places) < 2:
            raise DataError(f"there is one picture of {group!r}; draw it from two seeds or more to see how they differ.")
        yield unit[places]
