"""From scored pictures to comparisons: which pictures of a prompt are chosen, which rejected. Pure functions of scores.

A picker gets one prompt's scores and gives pairs of rows (better, worse). What it reads is in its docstring: `calibrated`
`[N, K]`, one column a reward, or `combined` `[N]`. NaN is a picture without a score; it is never picked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowalign.rng import key
from flowalign.scoring.combine import votes

Array = NDArray[np.float64]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Pool:
    """One prompt's pictures; only those that every reward scored."""

    prompt: str
    rows: NDArray[np.int64]
    """`[N]` in the table."""
    calibrated: Array
    """`[N, K]`"""
    combined: Array
    """`[N]`"""


def best_worst(pool: Pool, *, top: int = 1) -> Pairs:
    """The `top` best against as many worst by `combined`: best with worst, second with second worst, and so on."""
    order = np.argsort(-pool.combined, kind="stable")
    count = min(top, len(order) // 2)
    return [(int(order[place]), int(order[-1 - place])) for place in range(count)]


def margin(pool: Pool, *, least: float = 0.1) -> Pairs:
    """All pairs whose `combined` scores are at least so far apart, the furthest first."""
    gap = pool.combined[:, None] - pool.combined[None]
    better, worse = np.nonzero(gap >= max(least, np.finfo(float).tiny))
    order = np.argsort(-gap[better, worse], kind="stable")
    return [(int(better[place]), int(worse[place])) for place in order]


def dominates(scores: Array) -> NDArray[np.bool_]:
    """`[N, K]` -> `[N, N]`: a is at least as good as b by every reward, and better by one."""
    a, b = scores[:, None], scores[None]
    return (a >= b).all(2) & (a > b).any(2)


def fronts(scores: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(upper, lower) `[N]`: pictures that none dominates, and that dominate none."""
    over = dominates(scores)
    return ~over.any(0), ~over.any(1)


def frs(pool: Pool) -> Pairs:
    """Frontier-based rejection sampling (Lee et al. 2025, 2502.02588, CaPO): pairs across the `calibrated` Pareto fronts.

    X⁺ are the pictures that none dominates, X⁻ those that dominate none; a picture in both is in neither. Kept are the pairs in
    which x⁺ dominates x⁻. Where the fronts leave no pair, the best and the worst by the sum of rewards are taken.
    """
    over = dominates(pool.calibrated)
    upper, lower = fronts(pool.calibrated)
    upper, lower = upper & ~lower, lower & ~upper
    better, worse = np.nonzero(over & upper[:, None] & lower[None])
    if len(better):
        return [(int(a), int(b)) for a, b in zip(better, worse, strict=True)]
    return _extremes(pool.calibrated.sum(1))


def intersection(pool: Pool, *, share: float = 0.5) -> Pairs:
    """Pictures in the upper `share` of the prompt by every reward, against those in the lower by every one (CRAFT)."""
    count = len(pool.calibrated)
    rank = pool.calibrated.argsort(0, kind="stable").argsort(0, kind="stable")
    upper, lower = (rank >= count - max(1, round(share * count))).all(1), (rank < max(1, round(share * count))).all(1)
    better, worse = np.nonzero((upper & ~lower)[:, None] & (lower & ~upper)[None])
    return [(int(a), int(b)) for a, b in zip(better, worse, strict=True)]


def majority(pool: Pool) -> Pairs:
    """The picture that most rewards put before most others, against the one they put behind most (BalancedDPO, 2503.12575).

    Draws of votes count for neither.
    """
    return _extremes(np.sign(votes(pool.calibrated)).sum(1))


def random(pool: Pool, *, seed: int = 0) -> Pairs:
    """Two pictures by lot, the better one by `combined` chosen."""
    if len(pool.rows) < 2:
        return []
    lot = np.random.default_rng(key(seed, "select", pool.prompt))
    a, b = sorted(lot.choice(len(pool.rows), 2, replace=False), key=lambda each: -pool.combined[each])
    return [(int(a), int(b))] if pool.combined[a] > pool.combined[b] else []


def _extremes(values: Array) -> Pairs:
    best, worst = int(values.argmax()), int(values.argmin())
    return [(best, worst)] if values[best] > values[worst] else []


PICKERS: dict[str, Callable[..., Pairs]] = {
    "best_worst": best_worst,
    "margin": margin,
    "frs": frs,
    "intersection": intersection,
    "majority": majority,
    "random": random,
}


# ------------------------------------------------------------------------------------------------ of comparisons
def histogram_weights(gaps: Array, bins: int = 20, power: float = 0.5) -> Array:
    """Weights `[n]` of mean 1 that let rare gaps count more: (share of the gap's bin)^−power (VideoDPO, 2412.14167)."""
    if not len(gaps) or gaps.min() == gaps.max():
        return np.ones(len(gaps))
    edges = np.linspace(gaps.min(), gaps.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, gaps, side="right") - 1, 0, bins - 1)
    weight = (np.bincount(place, minlength=bins)[place] / len(gaps)) ** -power
    return weight / weight.mean()


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


ORDERS = ("potential", "explicit", "implicit", "random")


def order(
    by: str,
    explicit: Array,
    implicit: Array | None,
    names: Sequence[str],
    *,
    weight: float = 1.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Comparisons `[n]` from the first to keep to the last.

    potential; explicit: the largest gap of rewards first; implicit: the smallest |l_w − l_l| first; random: by a lot that
    belongs to each name. Raises ValueError for another order or missing margins.
    """
    if by == "random":
        return np.array(sorted(range(len(names)), key=lambda place: key(seed, "order", names[place])), dtype=np.int64)
    if by not in ORDERS:
        raise ValueError(f"comparisons are ordered by {by!r}; allowed: {', '.join(ORDERS)}")
    if by == "explicit":
        return np.argsort(-explicit, kind="stable")
    if implicit is None:
        raise ValueError(f"ordering by {by} reads margins of the model, and the comparisons have none")
    return np.argsort(-potential(explicit, implicit, weight) if by == "potential" else np.abs(implicit), kind="stable")
