"""What a score is worth: probabilities of being preferred, fitted on labelled pairs, and how good they are. Pure functions.

Everything is about differences d = R(a) − R(b) of two pictures of one prompt, oriented so that higher is better, and labels p,
the probability that a is preferred: 1 or 0 for a vote, ½ for a tie, a share of votes otherwise. All arrays are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, xlogy

Array = NDArray[np.float64]
LINKS = ("temperature", "platt", "isotonic")
BINS = 10
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
    1999). isotonic: the rising step function of least squares (Zadrozny and Elkan 2002) on the pairs and the same pairs
    exchanged, so that P(a ≻ b) + P(b ≻ a) = 1. Raises ValueError for an unknown kind.
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


def logistic(features: Array, label: Array, penalty: float = 0.0) -> Array:
    """Weights `[K]` of least mean cross-entropy of σ(x·w) + ½·penalty·‖w‖²; features x `[n, K]`, labels `[n]` in [0, 1].

    By Newton's method with halved steps: the loss is convex. Weights are kept within `STEEPEST`.
    """

    def loss(w: Array) -> float:
        z = features @ w
        return float(np.mean(np.logaddexp(0, z) - label * z) + 0.5 * penalty * w @ w)

    w = np.zeros(features.shape[1])
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
    at, place = np.unique(both, return_inverse=True)
    count = np.bincount(place).astype(np.float64)
    fitted = isotonic_regression(np.bincount(place, weights=labels) / count, weights=count).x
    ends = np.flatnonzero(np.diff(fitted, prepend=np.nan) != 0), np.flatnonzero(np.diff(fitted, append=np.nan) != 0)
    kept = np.unique(np.concatenate(ends))
    return tuple((float(at[each]), float(fitted[each])) for each in kept)


# ------------------------------------------------------------------------------------------------ ties
@dataclass(frozen=True)
class Ties:
    """A law of wins, ties and losses; `width` is Rao and Kupper's log θ >= 0 or Davidson's ν >= 0."""

    kind: str
    """rao_kupper or davidson."""
    slope: float
    width: float

    def __call__(self, difference: ArrayLike) -> Array:
        """`[n]` -> `[n, 3]`: probabilities that a wins, that neither does, that b wins.

        Rao and Kupper 1967: P(a) = e^a / (e^a + θ e^b). Davidson 1970: P(a) ∝ e^a, P(b) ∝ e^b, P(tie) ∝ ν √(e^a e^b).
        """
        z = self.slope * np.asarray(difference, dtype=np.float64)
        if self.kind == "rao_kupper":
            win, loss = expit(z - self.width), expit(-z - self.width)
            return np.stack([win, 1 - win - loss, loss], axis=-1)
        logits = np.stack([z / 2, np.full_like(z, np.log(max(self.width, 1e-300))), -z / 2], axis=-1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)


def fit_ties(kind: str, difference: ArrayLike, outcome: ArrayLike) -> Ties:
    """The most likely law; outcomes `[n]`: 1 where a won, 0 where b did, ½ for a tie. Raises ValueError for an unknown kind."""
    if kind not in ("rao_kupper", "davidson"):
        raise ValueError(f"there is no law of ties {kind!r}; allowed: rao_kupper, davidson")
    d, y = np.asarray(difference, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    place = np.where(y == 0.5, 1, np.where(y > 0.5, 0, 2))
    scale = float(np.sqrt(np.mean(d**2))) or 1.0

    def loss(x: Array) -> float:
        law = Ties(kind, x[0] / scale, np.exp(x[1]))
        return -float(np.mean(np.log(law(d)[np.arange(len(d)), place] + 1e-300)))

    found = minimize(
        loss, np.array([1.0, -1.0]), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    )
    return Ties(kind, float(found.x[0] / scale), float(np.exp(found.x[1])))


# ------------------------------------------------------------------------------------------------ win rates
def win_rate(scores: ArrayLike, link: Callable[[Array], Array], opponents: ArrayLike | None = None) -> Array:
    """Mean probability `[N]` of being preferred to the prompt's other pictures, or to `opponents` `[M]` of another generator.

    R_ca(x_i) = 1/(N−1) Σ_{j≠i} P(x_i ≻ x_j): Lee et al. 2025, 2502.02588 (CaPO), with P = σ of a temperature. NaN for a picture
    without a score or without an opponent.
    """
    own = np.asarray(scores, dtype=np.float64)
    others = own if opponents is None else np.asarray(opponents, dtype=np.float64)
    wins = link(own[:, None] - others[None, :])
    if opponents is None:
        np.fill_diagonal(wins, np.nan)
    known = ~np.isnan(wins)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, wins, 0).sum(1) / np.maximum(count, 1), np.nan)


def ranks(difference: Array) -> Array:
    """The link of temperature 0: 1 where higher, ½ where equal, 0 where lower."""
    return np.where(np.isnan(difference), np.nan, 0.5 * (1 + np.sign(difference)))


# ------------------------------------------------------------------------------------------------ fusion
@dataclass(frozen=True)
class Fusion:
    """P(a ≻ b) = σ(Σ_k w_k d_k / s_k) over several rewards."""

    rewards: tuple[str, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...]
    """s_k, root mean square of the differences of each reward."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """95 % intervals of the weights, from resampled prompts."""
    penalty: float

    def utility(self, scores: Array) -> Array:
        """Oriented scores `[n, K]` -> one number a picture `[n]`, whose differences are log odds."""
        return scores @ (np.array(self.weights) / np.array(self.scales))

    def __call__(self, difference: Array) -> Array:
        """`[n, K]` -> probabilities `[n]`."""
        return expit(self.utility(difference))


PENALTIES = tuple(10.0**power for power in range(-6, 1))


def fit_fusion(
    rewards: Sequence[str],
    difference: Array,
    label: Array,
    groups: Sequence[Hashable],
    *,
    folds: int = 5,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[Fusion, Array]:
    """Weights of several rewards, and the probabilities `[n]` that models which did not see a pair's prompt give it.

    differences `[n, K]`, labels `[n]`, groups `[n]`: prompts, which lie on one side of every split. The penalty is that of
    `PENALTIES` with the best out-of-fold log-loss.
    """
    scales = np.sqrt(np.mean(difference**2, axis=0))
    scales[scales == 0] = 1.0
    x = difference / scales
    fold, group = folds_of(groups, folds, seed)
    best = (np.inf, PENALTIES[0], np.full(len(label), 0.5))
    for penalty in PENALTIES:
        out = np.empty(len(label))
        for number in np.unique(fold):
            held = fold == number
            out[held] = expit(x[held] @ logistic(x[~held], label[~held], penalty)) if (~held).any() else 0.5
        best = min(best, (log_loss(out, label), penalty, out), key=lambda each: each[0])
    _, penalty, out = best
    weights = logistic(x, label, penalty)
    rng, count, drawn = np.random.default_rng(seed), int(group.max()) + 1, []
    rows = [np.flatnonzero(group == each) for each in range(count)]
    for _ in range(resamples):
        taken = np.concatenate([rows[each] for each in rng.integers(0, count, count)])
        drawn.append(logistic(x[taken], label[taken], penalty))
    low, high = np.quantile(np.array(drawn), (0.025, 0.975), axis=0) if drawn else (weights, weights)
    columns = [tuple(map(float, each)) for each in (weights, scales, low, high)]
    return Fusion(tuple(rewards), *columns, penalty=penalty), out


def folds_of(groups: Sequence[Hashable], folds: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(fold of each row, number of its group), `[n]` each: groups are dealt to folds in a random order."""
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    group = np.array([names[each] for each in groups], dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    return (order % max(2, min(folds, len(names))))[group], group


# ------------------------------------------------------------------------------------------------ how good a probability is
def accuracy(probability: ArrayLike, label: ArrayLike) -> float:
    """Share of pairs whose likelier picture is the preferred one; half a point where either says ½."""
    q, p = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    return float(np.mean(0.5 * (1 + np.sign(q - 0.5) * np.sign(p - 0.5))))


def log_loss(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean cross-entropy in nats: −p log q − (1−p) log(1−q), with q kept 1e-12 away from 0 and 1."""
    q, p = np.clip(np.asarray(probability, dtype=np.float64), 1e-12, 1 - 1e-12), np.asarray(label, dtype=np.float64)
    return float(-np.mean(xlogy(p, q) + xlogy(1 - p, 1 - q)))


def brier(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean (q − p)² (Brier 1950)."""
    return float(np.mean((np.asarray(probability, dtype=np.float64) - np.asarray(label, dtype=np.float64)) ** 2))


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
    if scheme not in ("mass", "width"):
        raise ValueError(f"bins are of equal mass or width, not {scheme!r}")
    q, p = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    if scheme == "width":
        place = np.minimum((q * bins).astype(np.int64), bins - 1)
    else:
        # equal probabilities belong together, whatever their number
        place = np.searchsorted(np.quantile(q, np.linspace(0, 1, bins + 1)[1:-1]), q, side="right")
    found = (place == number for number in range(bins))
    return [Bin(float(q[each].mean()), float(p[each].mean()), int(each.sum())) for each in found if each.any()]


def expected_calibration_error(probability: ArrayLike, label: ArrayLike, bins: int = BINS, scheme: str = "mass") -> float:
    """ECE: mean |predicted − observed| over the pairs' bins (Naeini et al. 2015)."""
    dots = reliability(probability, label, bins, scheme)
    total = sum(dot.count for dot in dots)
    return sum(dot.count * abs(dot.predicted - dot.observed) for dot in dots) / total


MEASURES: Mapping[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "log_loss": log_loss,
    "brier": brier,
    "ece": expected_calibration_error,
}


def with_intervals(
    probability: Array, label: Array, groups: Sequence[Hashable], *, resamples: int = 500, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Each of `MEASURES`: (value, low, high), a 95 % interval from resampled groups."""
    _, group = folds_of(groups, 2, seed)
    count = int(group.max()) + 1
    rows = [np.flatnonzero(group == each) for each in range(count)]
    rng = np.random.default_rng(seed)
    taken = [np.concatenate([rows[each] for each in rng.integers(0, count, count)]) for _ in range(resamples)]
    out = {}
    for name, measure in MEASURES.items():
        low, high = np.quantile([measure(probability[each], label[each]) for each in taken], (0.025, 0.975))
        out[name] = (measure(probability, label), float(low), float(high))
    return out
