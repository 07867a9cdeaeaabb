"""Laws of wins, ties and losses: what a difference of scores says where judges may also say "neither"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit

Array = NDArray[np.float64]
LAWS = ("rao_kupper", "davidson")


@dataclass(frozen=True)
class Ties:
    """P(win), P(tie) and P(loss) as functions of the difference d of two scores, with z = slope·d.

    rao_kupper (Rao and Kupper 1967): P(a) = e^z / (e^z + θ), P(b) = 1 / (1 + θ e^z), θ >= 1; P(tie) is the rest.
    davidson (Davidson 1970): P(a) : P(tie) : P(b) = e^(z/2) : ν : e^(-z/2), ν >= 0.
    """

    kind: str
    """One of `LAWS`."""
    slope: float
    width: float
    """log θ >= 0, or ν >= 0; 0 leaves no ties."""

    def __call__(self, difference: ArrayLike) -> Array:
        """`[...]` -> `[..., 3]`: probabilities that the first wins, that neither does, that the second wins."""
        z = self.slope * np.asarray(difference, dtype=np.float64)
        if self.kind == "rao_kupper":
            win, loss = expit(z - self.width), expit(-z - self.width)
            # 1 − win − loss without its cancellation
            return np.stack([win, np.expm1(2 * self.width) * win * loss, loss], axis=-1)
        logits = np.stack([z / 2, np.full_like(z, np.log(max(self.width, 1e-300))), -z / 2], axis=-1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def preferred(self, difference: ArrayLike) -> Array:
        """P(win) + ½ P(tie): the expected label, of the shape of the differences."""
        found = self(difference)
        return found[..., 0] + 0.5 * found[..., 1]


def fit_ties(kind: str, difference: ArrayLike, outcome: ArrayLike) -> Ties:
    """The most likely law; differences and outcomes `[n]`: 1 where the first won, 0 where the second did, ½ for a tie.

    An outcome that is a share of votes counts as what most voted for. Raises ValueError for an unknown kind.
    """
    if kind not in LAWS:
        raise ValueError(f"there is no law of ties {kind!r}; allowed: {', '.join(LAWS)}")
    d, y = np.asarray(difference, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    place = np.where(y == 0.5, 1, np.where(y > 0.5, 0, 2))
    rows, scale = np.arange(len(d)), float(np.sqrt(np.mean(d**2))) or 1.0

    def law(x: Array) -> Ties:
        return Ties(kind, float(x[0] / scale), float(np.exp(np.clip(x[1], -30, 30))))

    def loss(x: Array) -> float:
        return -float(np.mean(np.log(law(x)(d)[rows, place] + 1e-300)))

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    return law(minimize(loss, np.array([1.0, -1.0]), method="Nelder-Mead", options=options).x)
