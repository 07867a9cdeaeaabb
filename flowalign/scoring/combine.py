"""One number for several calibrated rewards, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from flowalign.errors import DataError, allowed

Array = NDArray[np.float64]
WAYS = ("mean", "sum", "min", "majority", "fused")


def combined(
    by: str,
    calibrated: Array,
    groups: Sequence[NDArray[np.int64]],
    utility: Array | None = None,
    weights: Sequence[float] | None = None,
) -> Array:
    """Calibrated scores `[n, K]` -> `[n]`, higher is better; NaN where a reward gave none.

    mean: of the rewards. sum: with `weights`. min: the worst reward. majority: the share of the prompt's other pictures over
    which most rewards put it, half for a draw of votes (BalancedDPO, 2503.12575). fused: mean probability against the prompt's
    other pictures, by the `utility` `[n]` of a fusion, whose differences are log odds. Raises DataError for another way, or a
    fused one without a fusion.
    """
    if by not in WAYS:
        raise DataError(f"scores are combined by {by!r}; {allowed(by, WAYS)}.")
    if by == "mean":
        return calibrated.mean(1)
    if by == "sum":
        return calibrated @ np.ones(calibrated.shape[1]) if weights is None else calibrated @ np.asarray(weights, float)
    if by == "min":
        return calibrated.min(1)
    if by == "fused" and utility is None:
        raise DataError("scores are combined by 'fused' and nothing was fused; calibrate with --pairs FILE --fuse.")
    out = np.full(len(calibrated), np.nan)
    for rows in groups:
        if by == "fused":
            known = rows[~np.isnan(utility[rows])] if utility is not None else rows
            wins = expit(utility[known][:, None] - utility[known][None]) if utility is not None else np.zeros((0, 0))
        else:
            known = rows[~np.isnan(calibrated[rows]).any(1)]
            wins = 0.5 * (1 + np.sign(votes(calibrated[known])))
        if len(known) > 1:
            out[known] = (wins.sum(1) - 0.5) / (len(known) - 1)
    return out


def votes(scores: Array) -> Array:
    """`[n, K]` -> `[n, n]`: rewards that put a before b minus those that put b before a."""
    return np.sign(scores[:, None, :] - scores[None, :, :]).sum(2)


def disagreement(calibrated: Array) -> Array:
    """`[n, K]` -> `[n]`: standard deviation of a picture's calibrated scores over the rewards; 0 where all say the same."""
    return calibrated.std(1)


def weighted(rewards: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """Weights in the order of the rewards, 0 where none is given. Raises DataError for a reward that is not there."""
    for name in weights:
        if name not in rewards:
            raise DataError(f"a weight is given for {name!r}; {allowed(name, rewards)}.")
    return [float(weights.get(name, 0.0)) for name in rewards]
