"""Several objectives at once: how far a front of policies reaches, and whether weights steer where they say.

Pure functions of scores that were measured already. Everywhere `scores` are `[n, M, K]`: n pictures' prompts and seeds, each
drawn under the same M weights, judged by K objectives, higher is better; `weights` are `[M, K]` on the simplex; `prompts` `[n]`
name each row's prompt, and prompts are what is resampled. The M points of a front are means over the n pictures. Objectives
are added up and multiplied, so they should be of one scale: calibrated ones are (`scoring.calibrate`). M single-objective
models, merged models or mixtures stand in for one policy under M weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.errors import DataError
from flowalign.evaluate.agreement import spearman
from flowalign.evaluate.compare import Estimate, WinRate, compare, mean_with_interval, of_means
from flowalign.evaluate.hacking import JointRates, joint_rates
from flowalign.scoring.select import fronts

Array = NDArray[np.float64]
RESAMPLES = 2_000


@dataclass(frozen=True)
class Against:
    """Two fronts on the same prompts, the second one's figures minus the first one's."""

    hypervolume: Estimate
    """Difference of hypervolumes over one reference point, resampled together."""
    coverage: Estimate
    """Share of the first front's points that some point of the second is at least as good as by every objective."""
    covered: Estimate
    """The same the other way round; the two need not add up to one."""


@dataclass(frozen=True)
class MultiObjective:
    """What is known of one policy under M weights."""

    points: tuple[tuple[Estimate, ...], ...]
    """`[M][K]`: means of each objective under each weight."""
    front: tuple[int, ...]
    """Places of the points that no other one dominates."""
    reference: tuple[float, ...]
    """`[K]`, from where the hypervolume is measured."""
    hypervolume: Estimate
    mean_inner_product: Estimate
    dispersion: Estimate
    steerability: tuple[Estimate, ...]
    """`[K]`"""
    joint: tuple[JointRates, ...]
    """`[M]` against the base; empty without one."""
    min_reward: tuple[WinRate, ...]
    """`[M]` against the base; empty without one."""


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume of what lies above `reference` `[K]` and is dominated by one of `points` `[N, K]`; exact, for any K.

    Zitzler and Thiele's (1998) measure of a front, computed in the way of WFG (While et al. 2012): points are taken in rising
    order of the last objective; what one adds to those after it is a slab of its own height, whose floor is the same question
    with one objective less. Exponential in K at worst. A point that is not above the reference by every objective adds nothing.
    Raises DataError for shapes that do not fit or numbers that are not finite.
    """
    points, reference = np.asarray(points, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if points.ndim != 2 or reference.shape != points.shape[1:] or not reference.size:
        raise DataError(
            f"points have shape {points.shape} and the reference point {reference.shape}; give [points, objectives] and one "
            "number for each objective."
        )
    if not (np.isfinite(points).all() and np.isfinite(reference).all()):
        raise DataError("a point or the reference point is NaN or infinite; find the score that is missing.")
    gaps = points - reference
    return _volume(gaps[(gaps > 0).all(1)])


def _volume(gaps: Array) -> float:
    """Of the union of boxes [0, gap]; gaps `[N, K]` are positive."""
    if not len(gaps):
        return 0.0
    if gaps.shape[1] == 1:
        return float(gaps.max())
    gaps = gaps[np.argsort(gaps[:, -1], kind="stable")]
    if gaps.shape[1] == 2:  # slices of rising height: each as wide as the widest box that reaches there
        reach = np.maximum.accumulate(gaps[::-1, 0])[::-1]
        return float(reach @ np.diff(gaps[:, 1], prepend=0.0))
    gaps = gaps[fronts(gaps)[0]]
    total = 0.0
    for place, gap in enumerate(gaps):
        floor = gap[:-1]
        total += gap[-1] * (float(floor.prod()) - _volume(np.minimum(gaps[place + 1 :, :-1], floor)))
    return total


def coverage(points: ArrayLike, others: ArrayLike) -> float:
    """Share of `others` `[N', K]` that some one of `points` `[N, K]` is at least as good as by every objective, in [0, 1].

    Zitzler and Thiele 1999, the C of two sets. Raises DataError for shapes that do not fit.
    """
    points, others = np.asarray(points, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if points.ndim != 2 or others.ndim != 2 or points.shape[1:] != others.shape[1:] or not (points.size and others.size):
        raise DataError(f"fronts have shapes {points.shape} and {others.shape}; give two of [points, objectives].")
    return float((points[:, None] >= others[None]).all(2).any(0).mean())


def base_minimum(base: ArrayLike) -> Array:
    """The reference point `[K]` if no other is given: the worst score of the base's pictures `[n, K]`, by each objective.

    It is one point of the whole sample and stays where it is while prompts are resampled.
    """
    base = np.asarray(base, dtype=np.float64)
    if base.ndim != 2 or not base.size:
        raise DataError(f"the base's scores have shape {base.shape}; give [pictures, objectives].")
    return base.min(0)


def hypervolume_of(
    scores: ArrayLike, prompts: Sequence[object], reference: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Hypervolume of the M points of `scores` `[n, M, K]` over `reference` `[K]`, with its interval."""
    scores = _checked(scores, prompts)
    hypervolume(scores[0], reference)  # says what does not fit

    def volumes(means: Array) -> Array:
        return np.array([[hypervolume(points, reference)] for points in means])

    return of_means(scores, prompts, volumes, resamples=resamples, seed=seed)[0]


def mean_inner_product(
    scores: ArrayLike, weights: ArrayLike, prompts: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """MIP = E_w[w·s]: what each weight asked for, summed by that weight; every weight of the M counts alike.

    In the scores' unit. A policy that ignores w gets the mean of its objectives where weights are spread evenly; more is to be
    had by following w, or by being better at everything.
    """
    scores = _checked(scores, prompts)
    asked = _weights(weights, scores)
    return mean_with_interval(np.einsum("nmk,mk->n", scores, asked) / len(asked), prompts, resamples=resamples, seed=seed)


def dispersion(scores: ArrayLike, prompts: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """CRD, conditional reward dispersion: how far scores move with the weights while prompt and seed stay.

    For row i: d_i = √(Σ_k Var_w s_ik(w)), the variance over the M weights (divided by M): the root mean square distance of the
    K-vector of scores from its mean over weights, and 1/√2 of that between two weights drawn at random. CRD is the mean of d_i.
    By the law of total variance it is the part of the spread that the weights explain once prompt and noise are given: 0 if and
    only if the weights change no score, however far prompts and seeds lie apart. It does not say that scores move where they
    were asked to (`steerability` does), and if rows do not share their seed between weights, sampling noise counts as steering.
    The definition is derived here from the name.
    """
    scores = _checked(scores, prompts)
    return mean_with_interval(np.sqrt(scores.var(axis=1).sum(axis=1)), prompts, resamples=resamples, seed=seed)


def steerability(
    scores: ArrayLike, weights: ArrayLike, prompts: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Estimate]:
    """Spearman's ρ between the M means of each objective and its own weight, `[K]`, in [-1, 1].

    NaN for an objective whose weight never changes. Weights that are equal share their rank, so with three objectives or more 1
    is only reached where equal weights give equal means.
    """
    scores = _checked(scores, prompts)
    asked = _weights(weights, scores)

    def correlations(means: Array) -> Array:
        which = np.repeat(np.arange(len(means)), len(asked))
        found = [
            spearman(np.tile(asked[:, objective], len(means)), means[:, :, objective].ravel(), which)
            for objective in range(asked.shape[1])
        ]
        return np.stack(found, axis=1)

    return of_means(scores, prompts, correlations, resamples=resamples, seed=seed)


def min_reward_win_rate(
    base: ArrayLike, aligned: ArrayLike, prompts: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0
) -> WinRate:
    """How often the worst of the K objectives of a picture is higher than the base's worst one; scores `[n, K]` of both.

    The worst of each picture is taken on calibrated scores, where objectives can be held against each other.
    """
    left, right = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    if left.ndim != 2 or left.shape != right.shape or not left.size:
        raise DataError(f"scores have shapes {left.shape} and {right.shape}; give two of one shape [pictures, objectives].")
    return compare(left.min(1), right.min(1), groups=prompts, resamples=resamples, seed=seed)


def against(
    first: ArrayLike,
    second: ArrayLike,
    prompts: Sequence[object],
    reference: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Against:
    """Two policies' scores `[n, M, K]` and `[n, M', K]` on the same rows -> by how much the second front is ahead."""
    first, second = _checked(first, prompts), _checked(second, prompts)
    if first.shape[2] != second.shape[2]:
        raise DataError(f"scores are of {first.shape[2]} and {second.shape[2]} objectives; judge both by the same ones.")
    hypervolume(first[0], reference)
    cut = first.shape[1]

    def statistic(means: Array) -> Array:
        rows = []
        for points in means:
            one, other = points[:cut], points[cut:]
            gain = hypervolume(other, reference) - hypervolume(one, reference)
            rows.append([gain, coverage(other, one), coverage(one, other)])
        return np.array(rows)

    both = np.concatenate([first, second], axis=1)
    return Against(*of_means(both, prompts, statistic, resamples=resamples, seed=seed))


def multi_objective(
    scores: ArrayLike,
    weights: ArrayLike,
    prompts: Sequence[object],
    *,
    base: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MultiObjective:
    """All figures of this module at once. `base`: scores `[n, K]` of the base's pictures of the same rows.

    The reference point is the base's minimum if none is given. Raises DataError without either of the two.
    """
    scores = _checked(scores, prompts)
    asked = _weights(weights, scores)
    if base is None and reference is None:
        raise DataError("a hypervolume needs a point to be measured from; give the base's scores or a reference point.")
    start = base_minimum(base) if reference is None and base is not None else np.asarray(reference, dtype=np.float64)
    many, kinds = asked.shape
    flat = of_means(scores, prompts, lambda means: means.reshape(len(means), -1), resamples=resamples, seed=seed)
    sides = [] if base is None else [scores[:, place] for place in range(many)]
    return MultiObjective(
        points=tuple(tuple(flat[place * kinds : (place + 1) * kinds]) for place in range(many)),
        front=tuple(int(place) for place in np.flatnonzero(fronts(scores.mean(0))[0])),
        reference=tuple(float(value) for value in start),
        hypervolume=hypervolume_of(scores, prompts, start, resamples=resamples, seed=seed),
        mean_inner_product=mean_inner_product(scores, asked, prompts, resamples=resamples, seed=seed),
        dispersion=dispersion(scores, prompts, resamples=resamples, seed=seed),
        steerability=tuple(steerability(scores, asked, prompts, resamples=resamples, seed=seed)),
        joint=tuple(joint_rates(base, side, prompts, seed=seed) for side in sides if base is not None),
        min_reward=tuple(
            min_reward_win_rate(base, side, prompts, resamples=resamples, seed=seed) for side in sides if base is not None
        ),
    )


def _checked(scores: ArrayLike, prompts: Sequence[object]) -> Array:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 3 or not scores.size or len(scores) != len(prompts) or not np.isfinite(scores).all():
        raise DataError(
            f"scores have shape {scores.shape} for {len(prompts)} prompts; give finite ones [pictures, weights, objectives], "
            "one prompt for each picture."
        )
    return scores


def _weights(weights: ArrayLike, scores: Array) -> Array:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != scores.shape[1:] or not ((weights >= 0).all() and np.allclose(weights.sum(1), 1, atol=1e-6)):
        raise DataError(
            f"weights have shape {weights.shape} for scores {scores.shape}; give [weights, objectives], each row not below 0 "
            "and summing to 1."
        )
    return weights
