"""Which comparisons are worth training on, and how much each counts: pure functions of gaps and margins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowalign.errors import DataError, allowed
from flowalign.rng import key

Array = NDArray[np.float64]
IMPLICIT = "implicit_margin"
"""Column of a comparison file: l_chosen − l_rejected of a model, see `align.margins`; not read by training."""
ORDERS = ("potential", "explicit", "implicit", "random")


def zscore(values: Array) -> Array:
    """Mean 0 and spread 1; zeros where all are equal."""
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def potential(explicit: Array, implicit: Array, weight: float = 1.0) -> Array:
    """Alignment potential `[n]` of comparisons: z(explicit) − w·z(|implicit|).

    explicit: gap of the rewards; implicit: l_w − l_l of the present model, without a reference, of which the absolute value
    counts. Much to learn is where rewards tell the pictures far apart and the model does not.

    Source: Huang et al. 2025, arXiv 2503.01864, with w = 1 for selection.
    """
    return zscore(explicit) - weight * zscore(np.abs(implicit))


def order(
    by: str,
    explicit: Array,
    implicit: Array,
    names: Sequence[str],
    *,
    weight: float = 1.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Comparisons `[n]` from the first to keep to the last; only what `by` reads must be there, the rest may be NaN.

    potential: the largest first; explicit: the largest gap of rewards first; implicit: the smallest |l_w − l_l| first; random:
    by a lot that belongs to each of `names`. Raises DataError for another order, or where a comparison lacks what it reads.
    """
    if by not in ORDERS:
        raise DataError(f"comparisons are ordered by {by!r}; {allowed(by, ORDERS)}.")
    if by == "random":
        return np.array(sorted(range(len(names)), key=lambda place: key(seed, "order", names[place])), dtype=np.int64)
    if by != "implicit" and (missing := int(np.isnan(explicit).sum())):
        raise DataError(
            f"{missing} of {len(names)} comparisons have no margin, which {by} reads; write them with flowalign select."
        )
    if by != "explicit" and (missing := int(np.isnan(implicit).sum())):
        raise DataError(
            f"{missing} of {len(names)} comparisons have no implicit_margin, which {by} reads; add it with flowalign margins."
        )
    if by == "explicit":
        return np.argsort(-explicit, kind="stable")
    return np.argsort(-potential(explicit, implicit, weight) if by == "potential" else np.abs(implicit), kind="stable")


def histogram_weights(gaps: Array, bins: int = 20, power: float = 0.5) -> Array:
    """Weights `[n]` of mean 1 that let rare gaps count more: (share of the gap's bin)^−power (VideoDPO, 2412.14167)."""
    if not len(gaps) or gaps.min() == gaps.max():
        return np.ones(len(gaps))
    edges = np.linspace(gaps.min(), gaps.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, gaps, side="right") - 1, 0, bins - 1)
    weight = (np.bincount(place, minlength=bins)[place] / len(gaps)) ** -power
    return weight / weight.mean()
