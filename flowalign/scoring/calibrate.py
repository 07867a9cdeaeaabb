"""What a score is worth: probabilities of being preferred, fitted on labelled pairs, and how good they are. Pure functions.

Everything is about differences d = R(a) − R(b) of two pictures of one prompt, oriented so that higher is better, and labels p,
the probability that a is preferred: 1 or 0 for a vote, ½ for a tie, a share of votes otherwise. All arrays are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression
from scipy.special import expit, xlogy

Array = NDArray[np.float64]
LINKS = ("temperature", "platt", "isotonic")
BINS = 10
BLOCK = 1 << 22
"""Differences that are held at once."""
STEEPEST = 1e6
"""Largest slope per unit of the differences' spread: where the labels separate perfectly there is no largest likelihood."""


@dataclass(frozen=True)
class Link:
    """From a difference of scores to the probability that the first picture is preferred."""

    kind: str
    """One of `LINKS`."""
    slope: float = 1.0
    """1/τ; negative for a reward that the labels contradict."""
    offset: float = 0.0
    """Of Platt's: what the label says where the scores are equal, log odds. A bias for the first place."""
    knots: tuple[tuple[float, float], ...] = ()
    """Of isotonic: (difference, probability), rising; between them on straight lines."""

    def __call__(self, difference: ArrayLike) -> Array:
        """P(a ≻ b) of any shape of differences; NaN stays NaN."""
        d = np.asarray(difference, dtype=np.float64)
        if self.kind == "isotonic":
            at, to = np.array(self.knots).T
            return np.where(np.isnan(d), np.nan, np.interp(d, at, to))
        return expit(self.slope * d + self.offset)

    @property
    def temperature(self) -> float:
        """τ = 1/slope."""
        return float("inf") if self.slope == 0 else 1.0 / self.slope


def fit_link(kind: str, difference: ArrayLike, label: ArrayLike) -> Link:
    """The most likely link of that kind; differences and labels `[n]`.

    temperature: σ(d/τ), Bradley-Terry with a scale (Guo et al. 2017, 1706.04599, for two classes). platt: σ(a·d + b) (Platt
    1999, with plain labels in place of his smoothed ones). isotonic: the rising step function of least squares (Zadrozny and
    Elkan 2002) on the pairs and the same pairs exchanged, so that P(a ≻ b) + P(b ≻ a) = 1; n pairs that agree do not make a
    probability of 1, so it is kept within 1/(n+2) and 1 − 1/(n+2), Laplace's rule of succession. Raises ValueError for an
    unknown kind.
    """
    d, p = np.asarray(difference, dtype=np.float64), np.asarray(label, dtype=np.float64)
    if kind == "isotonic":
        return Link(kind, knots=_isotonic(d, p))
    if kind not in LINKS:
        raise ValueError(f"there is no link {kind!r}; allowed: {', '.join(LINKS)}")
    scale = float(np.sqrt(np.mean(d**2))) or 1.0
    columns = [d / scale] if kind == "temperature" else [d / scale, np.ones_like(d)]
    weights = logistic(np.stack(columns, axis=1), p)
    return Link(kind, slope=float(weights[0]) / scale, offset=float(weights[1]) if kind == "platt" else 0.0)


def logistic(features: Array, label: Array, penalty: float = 0.0, start: Array | None = None) -> Array:
    """Weights `[K]` of least mean cross-entropy of σ(x·w) + ½·penalty·‖w‖²; features x `[n, K]`, labels `[n]` in [0, 1].

    By Newton's method with halved steps, from `start` or 0: the loss is convex. Weights are kept within `STEEPEST`.
    """

    def loss(w: Array) -> float:
        z = features @ w
        return float(np.mean(np.logaddexp(0, z) - label * z) + 0.5 * penalty * w @ w)

    w = np.zeros(features.shape[1]) if start is None else start
    for _ in range(200):
        q = expit(features @ w)
        gradient = features.T @ (q - label) / len(label) + penalty * w
        curvature = (features * (q * (1 - q))[:, None]).T @ features / len(label) + (penalty + 1e-12) * np.eye(len(w))
        step, now = np.linalg.solve(curvature, gradient), loss(w)
        while loss(w - step) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        w = np.clip(w - step, -STEEPEST, STEEPEST)
        if np.abs(step).max() < 1e-10 * max(1.0, np.abs(w).max()):
            break
    return w


def _isotonic(d: Array, p: Array) -> tuple[tuple[float, float], ...]:
    both, labels = np.concatenate([d, -d]), np.concatenate([p, 1 - p])
    # 0.3 and 0.1 + 0.2 are one difference
    scale = float(np.abs(d).max()) or 1.0
    _, first, place = np.unique(np.round(both / scale, 9), return_index=True, return_inverse=True)
    at = both[first]
    count = np.bincount(place).astype(np.float64)
    fitted = isotonic_regression(np.bincount(place, weights=labels) / count, weights=count).x
    fitted = np.clip(fitted, 1 / (len(d) + 2), 1 - 1 / (len(d) + 2))
    ends = np.flatnonzero(np.diff(fitted, prepend=np.nan) != 0), np.flatnonzero(np.diff(fitted, append=np.nan) != 0)
    kept = np.unique(np.concatenate(ends))
    return tuple((float(at[each]), float(fitted[each])) for each in kept)


# ------------------------------------------------------------------------------------------------ win rates
def win_rate(scores: ArrayLike, link: Callable[[Array], Array], opponents: ArrayLike | None = None) -> Array:
    """Mean probability `[N]` of being preferred to the prompt's other pictures, or to `opponents` `[M]` of another generator.

    R_ca(x_i) = 1/(N−1) Σ_{j≠i} P(x_i ≻ x_j): Lee et al. 2025, 2502.02588 (CaPO), with P = σ of a temperature. NaN for a picture
    without a score or without an opponent.
    """
    own = np.asarray(scores, dtype=np.float64)
    others = own if opponents is None else np.asarray(opponents, dtype=np.float64)
    out = np.full(len(own), np.nan)
    step = max(1, BLOCK // max(1, len(others)))
    for start in range(0, len(own), step):
        block = slice(start, start + step)
        wins = link(own[block, None] - others[None, :])
        if opponents is None:
            wins[np.arange(len(wins)), np.arange(len(wins)) + start] = np.nan
        known = ~np.isnan(wins)
        count = known.sum(1)
        out[block] = np.where(count > 0, np.where(known, wins, 0).sum(1) / np.maximum(count, 1), np.nan)
    return out


def ranks(difference: Array) -> Array:
    """The link of temperature 0: 1 where higher, ½ where equal, 0 where lower."""
    return np.where(np.isnan(difference), np.nan, 0.5 * (1 + np.sign(difference)))


# ------------------------------------------------------------------------------------------------ how good a probability is
def resampled(group: NDArray[np.int64], resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Rows of bootstrap samples: whole groups, numbered from 0, drawn with replacement."""
    order = np.argsort(group, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(group))[:-1])
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.concatenate([rows[each] for each in rng.integers(0, len(rows), len(rows))])


def folds_of(groups: Sequence[Hashable], folds: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(fold of each row, number of its group), `[n]` each: groups are dealt to folds in a random order."""
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    group = np.array([names[each] for each in groups], dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    return (order % max(2, min(folds, len(names))))[group], group


def accuracy(probability: ArrayLike, label: ArrayLike) -> float:
    """Share of pairs whose likelier picture is the preferred one; half a point where either says ½."""
    return float(_right(*_floats(probability, label)).mean())


def log_loss(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean cross-entropy in nats: −p log q − (1−p) log(1−q), with q kept 1e-12 away from 0 and 1."""
    return float(_surprise(*_floats(probability, label)).mean())


def brier(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean (q − p)² (Brier 1950)."""
    return float(_square(*_floats(probability, label)).mean())


def _floats(probability: ArrayLike, label: ArrayLike) -> tuple[Array, Array]:
    return np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)


def _right(q: Array, p: Array) -> Array:
    return 0.5 * (1 + np.sign(q - 0.5) * np.sign(p - 0.5))


def _surprise(q: Array, p: Array) -> Array:
    q = np.clip(q, 1e-12, 1 - 1e-12)
    return -xlogy(p, q) - xlogy(1 - p, 1 - q)


def _square(q: Array, p: Array) -> Array:
    return (q - p) ** 2


@dataclass(frozen=True)
class Bin:
    """One dot of a reliability diagram."""

    predicted: float
    """Mean probability."""
    observed: float
    """Mean label."""
    count: int


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = BINS, scheme: str = "mass") -> list[Bin]:
    """Pairs by their probability, in bins of equal `mass` or equal `width`; empty bins are left out.

    Raises ValueError for another scheme.
    """
    q, p = _floats(probability, label)
    place = _places(q, bins, scheme)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (q, p)]
    return [
        Bin(float(predicted / number), float(observed / number), int(number))
        for predicted, observed, number in zip(*sums, count, strict=True)
        if number
    ]


def _places(q: Array, bins: int, scheme: str) -> NDArray[np.int64]:
    if scheme == "width":
        return np.minimum((q * bins).astype(np.int64), bins - 1)
    if scheme != "mass":
        raise ValueError(f"bins are of equal mass or width, not {scheme!r}")
    # equal probabilities belong together, whatever their number
    return np.searchsorted(np.quantile(q, np.linspace(0, 1, bins + 1)[1:-1]), q, side="right")


def expected_calibration_error(probability: ArrayLike, label: ArrayLike, bins: int = BINS, scheme: str = "mass") -> float:
    """ECE: mean |predicted − observed| over the pairs' bins (Naeini et al. 2015).

    It is never 0 on a sample: with n pairs, labels that are drawn from the probabilities themselves give about √(bins/n)/3.
    """
    q, p = _floats(probability, label)
    return float(np.abs(np.bincount(_places(q, bins, scheme), weights=q - p)).sum() / len(q))


def with_intervals(
    probability: Array, label: Array, groups: Sequence[Hashable], *, resamples: int = 400, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """accuracy, log_loss, brier and ece: (value, low, high), a 95 % interval from resampled groups.

    The percentiles are shifted by the bootstrap's own bias, mean of the resamples − value: the ECE of a resample is larger than
    that of the sample, and an interval of plain percentiles can lie above what it is the interval of.
    """
    _, group = folds_of(groups, 2, seed)
    terms = {
        "accuracy": _right(probability, label),
        "log_loss": _surprise(probability, label),
        "brier": _square(probability, label),
    }
    values = {name: float(each.mean()) for name, each in terms.items()} | {
        "ece": expected_calibration_error(probability, label)
    }
    found: dict[str, list[float]] = {name: [] for name in values}
    for rows in resampled(group, resamples, seed):
        for name, each in terms.items():
            found[name].append(float(each[rows].mean()))
        found["ece"].append(expected_calibration_error(probability[rows], label[rows]))
    out = {}
    for name, value in values.items():
        low, high = np.quantile(found[name], (0.025, 0.975)) - (np.mean(found[name]) - value)
        out[name] = (value, max(0.0, float(low)), float(high))
    return out
