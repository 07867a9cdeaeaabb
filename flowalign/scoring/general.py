"""A general preference model: votes that no single score can explain, such as rock, paper and scissors.

Zhang et al. 2024, 2410.02197: a picture is a vector v of 2k numbers and P(y ≻ y') = σ(v(y)ᵀ R v(y')) with R skew-symmetric, k
blocks [[0, 1], [−1, 0]]; so P(y ≻ y') + P(y' ≻ y) = 1 and P(y ≻ y) = ½ by construction, while a ≻ b ≻ c ≻ a is possible. Here v
is linear in frozen features with a constant, which makes Bradley-Terry a special case: with v = (r, 1) the score is r − r'.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

from flowalign.errors import DataError
from flowalign.scoring.calibrate import folds_of, log_loss

Array = NDArray[np.float64]
BLOCKS = 2
"""k, unless told otherwise: one for an order, one for a cycle."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of ½·penalty·‖W‖² beside a mean log-loss; the constant is not penalised."""
ITERATIONS = 300


@dataclass(frozen=True)
class General:
    """v = W·(x − mean)/scale with a constant beside x."""

    source: str
    """What the features are: "scores" of the rewards named in `features`, or the fingerprint of what saw the pictures."""
    features: tuple[str, ...]
    mean: tuple[float, ...]
    """`[D]`"""
    scale: tuple[float, ...]
    """`[D]`"""
    weights: tuple[tuple[float, ...], ...]
    """W `[2k, D + 1]`; rows 2l and 2l + 1 are a block of R, the last column is the constant's."""
    penalty: float

    def vectors(self, features: Array) -> Array:
        """Features `[..., D]` -> v `[..., 2k]`."""
        return _with_constant((features - np.array(self.mean)) / np.array(self.scale)) @ np.array(self.weights).T

    def log_odds(self, first: Array, second: Array) -> Array:
        """Features `[..., D]` of both -> log P(first ≻ second) / P(second ≻ first) `[...]`."""
        return _score(self.vectors(first), self.vectors(second))


def _with_constant(x: Array) -> Array:
    return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)


def _score(v: Array, other: Array) -> Array:
    """vᵀ R v'."""
    return (v[..., 0::2] * other[..., 1::2] - v[..., 1::2] * other[..., 0::2]).sum(-1)


def fit_general(
    features: Array,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    label: Array,
    *,
    source: str,
    names: Sequence[str] = (),
    blocks: int = BLOCKS,
    penalty: float = 1e-3,
    seed: int = 0,
) -> General:
    """Features `[n, D]`, rows of pairs `[m]` and the probability `[m]` that the first is preferred -> the model, by maximum
    likelihood.

    The likelihood has more than one optimum in W; the search begins beside an order, with one v = (0, 1), and numbers drawn by
    the seed. Rows with a NaN, of pictures that lack a score, take no part. Raises DataError for fewer than one block, no pair,
    and a pair of such a row.
    """
    if blocks < 1 or not len(label):
        raise DataError(f"a general preference model has {blocks} blocks and {len(label)} pairs; both must be at least 1.")
    known = ~np.isnan(features).any(1)
    if not (known[first] & known[second]).all():
        raise DataError("a labelled pair has a picture without features; leave the pair out.")
    mean, scale = features[known].mean(0), features[known].std(0)
    scale = np.where(scale > 0, scale, 1.0)
    x = _with_constant(np.where(known[:, None], (features - mean) / scale, 0.0))
    start = 0.1 * np.random.default_rng(seed).normal(size=(2 * blocks, x.shape[1])) / np.sqrt(x.shape[1])
    start[1, -1] = 1.0
    free = np.ones_like(start)
    free[:, -1] = 0.0

    turn = np.kron(np.eye(blocks), [[0.0, 1.0], [-1.0, 0.0]])  # R
    shape, count = (len(features), len(label)), np.arange(len(label))
    to_first, to_second = (csr_array((np.ones(len(label)), (rows, count)), shape=shape) for rows in (first, second))

    def loss(flat: Array) -> tuple[float, Array]:
        w = flat.reshape(start.shape)
        v = x @ w.T
        one, other = v[first], v[second]
        score = _score(one, other)
        value = np.mean(np.logaddexp(0, score) - label * score) + 0.5 * penalty * float((free * w * w).sum())
        g = ((expit(score) - label) / len(label))[:, None]
        by_v = to_first @ (g * (other @ turn.T)) + to_second @ (g * (one @ turn))
        return float(value), (by_v.T @ x + penalty * free * w).ravel()

    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    rows = tuple(tuple(map(float, row)) for row in found.x.reshape(start.shape))
    return General(source, tuple(names), tuple(mean.tolist()), tuple(scale.tolist()), rows, penalty)


def fit_held_out(
    features: Array,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    label: Array,
    groups: Sequence[Hashable],
    *,
    source: str,
    names: Sequence[str] = (),
    blocks: int = BLOCKS,
    folds: int = 5,
    seed: int = 0,
) -> tuple[General, Array]:
    """(the model, what models say `[m]` that did not see a pair's prompt).

    The penalty is the one of `PENALTIES` with the least log-loss on held-out prompts `groups` `[m]`; what is out of fold has a
    penalty of its own, found without the fold.
    """

    def fit(rows: NDArray[np.bool_], penalty: float) -> General:
        told = dict(source=source, names=names, blocks=blocks, penalty=penalty, seed=seed)
        return fit_general(features, first[rows], second[rows], label[rows], **told)  # type: ignore[arg-type]

    def said(model: General, rows: NDArray[np.bool_]) -> Array:
        return expit(model.log_odds(features[first[rows]], features[second[rows]]))

    def best(rows: NDArray[np.bool_], fold: NDArray[np.int64]) -> float:
        losses = []
        for penalty in PENALTIES:
            out = np.full(len(label), 0.5)
            for number in np.unique(fold[rows]):
                held = rows & (fold == number)
                if not held[rows].all():
                    out[held] = said(fit(rows & ~held, penalty), held)
            losses.append(log_loss(out[rows], label[rows]))
        return PENALTIES[int(np.argmin(losses))]

    fold, _ = folds_of(groups, folds, seed)
    every, out = np.ones(len(label), dtype=bool), np.full(len(label), 0.5)
    for number in np.unique(fold):
        held = fold == number
        if held.all():
            break
        inner = np.zeros(len(label), dtype=np.int64)
        inner[~held], _ = folds_of([groups[row] for row in np.flatnonzero(~held)], 3, seed)
        out[held] = said(fit(~held, best(~held, inner)), held)
    return fit(every, best(every, fold)), out


def pool_rates(
    model: General,
    features: Array,
    groups: Mapping[str, NDArray[np.int64]],
    others: Array | None = None,
    their_groups: Mapping[str, NDArray[np.int64]] | None = None,
) -> Array:
    """P(y ≻ π) `[n]`: the mean probability to win against the prompt's other pictures, or against the `others` of the prompt.

    The target that SPPO (Wu et al. 2024, 2405.00675) and GPO draw log-ratios to. NaN where a picture has no features or none to
    be held against. features `[n, D]`; groups: prompt -> its rows.
    """
    out, none = np.full(len(features), np.nan), np.array([], dtype=np.int64)
    known = ~np.isnan(features).any(1)
    pool = features if others is None else others
    there = ~np.isnan(pool).any(1)
    for prompt, rows in groups.items():
        mine = rows[known[rows]]
        theirs = mine if others is None else (their_groups or {}).get(prompt, none)
        theirs = theirs[there[theirs]]
        v, w = model.vectors(features[mine]), model.vectors(pool[theirs])
        wins = expit(_score(v[:, None], w[None]))
        if others is None:
            wins[np.arange(len(mine)), np.arange(len(mine))] = 0.0
        count = len(theirs) - (others is None)
        if count > 0:
            out[mine] = wins.sum(1) / count
    return out
