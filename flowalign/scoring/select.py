"""From scored pictures to pairs: which pictures of a prompt are chosen, which rejected. Pure functions of scores.

A picker gets one prompt's `Pool` and gives pairs (better, worse) of places in it, the most telling first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowalign.rng import key
from flowalign.scoring.combine import votes

Array = NDArray[np.float64]
Pairs = list[tuple[int, int]]
TEMPERATURE = 0.5
"""β that Liu et al. 2023, 2309.06657, found best."""


@dataclass(frozen=True)
class Pool:
    """One prompt's pictures; only those that every reward scored."""

    prompt: str
    rows: NDArray[np.int64]
    """`[N]` in the table."""
    rewards: Array
    """`[N, K]`, one column a reward, higher is better: calibrated, where rewards are held against each other."""
    score: Array
    """`[N]`, one number for all of them, higher is better."""
    seed: int = 0
    """Of what is drawn by lot."""
    temperature: float = TEMPERATURE
    """β of rso, in the unit of `score`."""


def best_worst(pool: Pool) -> Pairs:
    """The best against the worst by `score`, the second against the second worst, and so on."""
    order = np.argsort(-pool.score, kind="stable")
    return [(int(order[place]), int(order[-1 - place])) for place in range(len(order) // 2)]


def margin(pool: Pool) -> Pairs:
    """All pairs, the furthest apart by `score` first; a least gap and a cap are for what comes after."""
    better, worse = np.triu_indices(len(pool.score), 1)
    swap = pool.score[better] < pool.score[worse]
    better, worse = np.where(swap, worse, better), np.where(swap, better, worse)
    order = np.argsort(-(pool.score[better] - pool.score[worse]), kind="stable")
    return [(int(better[place]), int(worse[place])) for place in order]


def dominates(scores: Array) -> NDArray[np.bool_]:
    """`[N, K]` -> `[N, N]`: a is at least as good as b by every reward, and better by one."""
    a, b = scores[:, None], scores[None]
    return (a >= b).all(2) & (a > b).any(2)


def fronts(scores: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(upper, lower) `[N]`: pictures that none dominates, and pictures that dominate none."""
    over = dominates(scores)
    return ~over.any(0), ~over.any(1)


def frs(pool: Pool) -> Pairs:
    """Frontier-based rejection sampling (Lee et al. 2025, 2502.02588, CaPO): pairs across the Pareto fronts of `rewards`.

    X⁺ are the pictures that none dominates, X⁻ those that dominate none; a picture in both is in neither. Kept are the pairs in
    which x⁺ dominates x⁻, furthest apart by `score` first. Where the fronts leave no pair, the best and the worst by the sum
    of rewards are taken.
    """
    over = dominates(pool.rewards)
    upper, lower = fronts(pool.rewards)
    upper, lower = upper & ~lower, lower & ~upper
    better, worse = np.nonzero(over & upper[:, None] & lower[None])
    return _sorted(pool, better, worse) or _extremes(pool.rewards.sum(1))


def intersection(pool: Pool) -> Pairs:
    """Pictures in the better half of the prompt by every reward, against those in the worse half by every one (CRAFT).

    Equal scores are in the same halves; a picture in both is in neither.
    """
    half = len(pool.rewards) / 2
    ahead = (pool.rewards[None] > pool.rewards[:, None]).sum(1)  # of each picture, by each reward
    behind = (pool.rewards[None] < pool.rewards[:, None]).sum(1)
    upper, lower = (ahead < half).all(1), (behind < half).all(1)
    better, worse = np.nonzero((upper & ~lower)[:, None] & (lower & ~upper)[None])
    return _sorted(pool, better, worse)


def majority(pool: Pool) -> Pairs:
    """The picture that most rewards put before most others, against the one they put behind most (BalancedDPO, 2503.12575).

    Each pair of pictures is a vote of the rewards; a draw counts for neither.
    """
    return _extremes(np.sign(votes(pool.rewards)).sum(1))


def random(pool: Pool) -> Pairs:
    """Pictures paired by lot, the better one by `score` chosen. The lot is that of the prompt and the pool's seed."""
    lot = np.random.default_rng(key(pool.seed, "select", pool.prompt)).permutation(len(pool.rows))
    pairs = [(int(a), int(b)) for a, b in zip(lot[0::2], lot[1::2], strict=False)]
    return [(a, b) if pool.score[a] >= pool.score[b] else (b, a) for a, b in pairs]


def accepted(score: Array, count: int, temperature: float, rng: np.random.Generator) -> list[int]:
    """Places of `count` pictures that statistical rejection sampling keeps of `score` `[N]`, in the order of being accepted.

    Pictures of the policy are taken in turn, each accepted with probability exp((r − r_max)/β), r_max being the highest score
    of those not accepted before this turn, until there are `count`: nearly draws of the policy times exp(r/β), the best policy
    under a KL penalty β, if many are left. Towards 0, β takes the best ones; towards infinity, any.

    Source: Liu et al. 2023, arXiv 2309.06657, Algorithm 1.
    """
    left, out = [int(place) for place in rng.permutation(len(score))], []
    while left and len(out) < count:
        best = max(score[place] for place in left)
        for place in tuple(left):
            if len(out) < count and rng.random() < np.exp((score[place] - best) / temperature):
                out.append(place)
                left.remove(place)
    return out


def rso(pool: Pool) -> Pairs:
    """Half of the prompt's pictures by statistical rejection sampling, see `accepted`, paired by lot, the better one chosen.

    The lot is that of the prompt and the pool's seed. Two pictures at least are accepted.
    """
    rng = np.random.default_rng(key(pool.seed, "rso", pool.prompt))
    lot = accepted(pool.score, max(2, len(pool.rows) // 2), pool.temperature, rng)
    lot = [lot[place] for place in rng.permutation(len(lot))]
    pairs = zip(lot[0::2], lot[1::2], strict=False)
    return [(a, b) if pool.score[a] >= pool.score[b] else (b, a) for a, b in pairs]


def _sorted(pool: Pool, better: NDArray[np.int64], worse: NDArray[np.int64]) -> Pairs:
    order = np.argsort(-(pool.score[better] - pool.score[worse]), kind="stable")
    return [(int(better[place]), int(worse[place])) for place in order]


def _extremes(values: Array) -> Pairs:
    best, worst = int(values.argmax()), int(values.argmin())
    return [(best, worst)] if values[best] > values[worst] else []


PICKERS: dict[str, Callable[[Pool], Pairs]] = {
    "best_worst": best_worst,
    "margin": margin,
    "frs": frs,
    "intersection": intersection,
    "majority": majority,
    "random": random,
    "rso": rso,
}
