"""Several rewards as one probability: a regularised logistic combination, fitted on labelled pairs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from flowalign.scoring.calibrate import folds_of, log_loss, logistic, resampled

Array = NDArray[np.float64]
PENALTIES = tuple(10.0**power for power in range(-6, 1))
"""Of ½·penalty·‖w‖² beside a mean log-loss; scikit-learn's C is 1 / (penalty · pairs)."""


@dataclass(frozen=True)
class Fusion:
    """P(a ≻ b) = σ(Σ_k w_k d_k / s_k) over several rewards."""

    rewards: tuple[str, ...]
    weights: tuple[float, ...]
    """w_k, of differences that were divided by their root mean square, so that weights can be compared."""
    scales: tuple[float, ...]
    """s_k, root mean square of the differences of each reward."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """95 % intervals of the weights, from resampled prompts."""
    penalty: float

    def utility(self, scores: Array) -> Array:
        """Oriented scores `[..., K]` -> one number a picture `[...]`, whose differences are log odds."""
        return scores @ (np.array(self.weights) / np.array(self.scales))

    def __call__(self, difference: Array) -> Array:
        """`[n, K]` -> probabilities `[n]`."""
        return expit(self.utility(difference))


@dataclass(frozen=True)
class OutOfFold:
    """What models say of pairs whose prompts they did not see."""

    probability: Array
    """`[n]`"""
    fold: NDArray[np.int64]
    """`[n]` which fold a pair was held out in."""
    weights: Array
    """`[folds, K]` of the model that did not see that fold; for differences as they are, not divided by `Fusion.scales`."""


def fit_fusion(
    rewards: Sequence[str],
    difference: Array,
    label: Array,
    groups: Sequence[Hashable],
    *,
    folds: int = 5,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[Fusion, OutOfFold]:
    """Weights of several rewards, and what models say that did not see a pair's prompt.

    differences `[n, K]`, labels `[n]`, groups `[n]`: prompts, which lie on one side of every split. The penalty is the one of
    `PENALTIES` with the best log-loss on held-out prompts. What is out of fold has its scales and its penalty from the other
    folds as well, the penalty by folds within them.
    """
    fold, group = folds_of(groups, folds, seed)
    numbers = np.unique(fold)
    out = OutOfFold(np.full(len(label), 0.5), fold, np.zeros((len(numbers), difference.shape[1])))
    for number in numbers:
        held = fold == number
        scales = _scales(difference[~held])
        x = difference[~held] / scales
        inner, _ = folds_of([groups[row] for row in np.flatnonzero(~held)], folds, seed)
        out.weights[number] = logistic(x, label[~held], _best_penalty(x, label[~held], inner)) / scales
        out.probability[held] = expit(difference[held] @ out.weights[number])
    scales = _scales(difference)
    x = difference / scales
    penalty = _best_penalty(x, label, fold)
    weights = logistic(x, label, penalty)
    drawn = [logistic(x[rows], label[rows], penalty, start=weights) for rows in resampled(group, resamples, seed)]
    low, high = np.quantile(np.array(drawn), (0.025, 0.975), axis=0) if drawn else (weights, weights)
    columns = [tuple(map(float, each)) for each in (weights, scales, low, high)]
    return Fusion(tuple(rewards), *columns, penalty=penalty), out


def _scales(difference: Array) -> Array:
    scales = np.sqrt(np.mean(difference**2, axis=0))
    return np.where(scales == 0, 1.0, scales)


def _best_penalty(x: Array, label: Array, fold: NDArray[np.int64]) -> float:
    """The one with the least log-loss out of fold; the smallest where there is one fold only."""
    losses = []
    for penalty in PENALTIES:
        out = np.full(len(label), 0.5)
        for number in np.unique(fold):
            held = fold == number
            if not held.all():
                out[held] = expit(x[held] @ logistic(x[~held], label[~held], penalty))
        losses.append(log_loss(out, label))
    return PENALTIES[int(np.argmin(losses))]
