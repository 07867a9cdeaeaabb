"""One number for several calibrated rewards, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flowalign.errors import DataError, allowed

Array = NDArray[np.float64]
WAYS = ("mean", "sum", "min", "majority", "fused", "general")


def combined(
    by: str,
    calibrated: Array,
    groups: Sequence[NDArray[np.int64]],
    *,
    rewards: Sequence[str] = (),
    fused: Array | None = None,
    general: Array | None = None,
    weights: Mapping[str, float] | None = None,
) -> Array:
    """Calibrated scores `[n, K]` -> `[n]`, higher is better; NaN where a reward gave none.

    mean: of the rewards. sum: with `weights` of the `rewards`, 1 each if left out. min: the worst reward. majority: the share
    of the prompt's other pictures (`groups` holds each prompt's rows) over which most rewards put it, half for a draw of votes
    (BalancedDPO, 2503.12575). fused: the win rates `[n]` of a fusion of raw scores. general: those of a general preference
    model. Raises DataError for another way, fused or general without what was fitted for it, weights without sum or of a reward
    that is not there.
    """
    if by not in WAYS:
        raise DataError(f"scores are combined by {by!r}; {allowed(by, WAYS)}.")
    if weights and by != "sum":
        raise DataError(f"weights {', '.join(weights)} are for a weighted sum, and scores are combined by {by!r}; use sum.")
    if by == "mean":
        return calibrated.mean(1)
    if by == "sum":
        return calibrated @ weighted(rewards, weights) if weights else calibrated.sum(1)
    if by == "min":
        return calibrated.min(1)
    if by == "fused":
        if fused is None:
            raise DataError("scores are combined by 'fused' and nothing was fused; calibrate with --pairs FILE --fuse.")
        return fused
    if by == "general":
        if general is None:
            raise DataError(
                "scores are combined by 'general' and no such model was fitted; calibrate with --pairs and --general."
            )
        return general
    out = np.full(len(calibrated), np.nan)
    for rows in groups:
        known = rows[~np.isnan(calibrated[rows]).any(1)]
        if len(known) > 1:
            wins = 0.5 * (1 + np.sign(votes(calibrated[known])))
            out[known] = (wins.sum(1) - 0.5) / (len(known) - 1)  # without the half against itself
    return out


def votes(scores: Array) -> Array:
    """`[n, K]` -> `[n, n]`: rewards that put a before b minus those that put b before a."""
    return np.sign(scores[:, None, :] - scores[None, :, :]).sum(2)


def disagreement(calibrated: Array) -> Array:
    """`[n, K]` -> `[n]`: standard deviation of a picture's calibrated scores over the rewards; 0 where all say the same.

    Calibrated scores are win rates, so it lies in [0, ½]; it is ½ where half of the rewards say 0 and half say 1.
    """
    return calibrated.std(1)


def weighted(rewards: Sequence[str], weights: Mapping[str, float]) -> Array:
    """Weights `[K]` in the order of the rewards, 0 where none is given. Raises DataError for a reward that is not there."""
    for name in weights:
        if name not in rewards:
            raise DataError(f"a weight is given for {name!r}; {allowed(name, rewards)}.")
    return np.array([float(weights.get(name, 0.0)) for name in rewards])
