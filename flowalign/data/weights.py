"""Weights of several objectives on the simplex: what a comparison holds under them, and what a steered policy is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flowalign.errors import ConfigError, DataError, allowed

WEIGHTS = "objective_weights"
"""Name in a Conditioning of the weights `[B, K]` that a steered policy is told; zeros where it is told none."""
TOLERANCE = 1e-3
"""How far the weights of a row may be from a sum of 1."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise DataError for weights of a comparison that do not lie on the simplex."""
    values = list(weights.values())
    if not values or not all(math.isfinite(value) and value >= 0 for value in values) or abs(sum(values) - 1) > TOLERANCE:
        raise DataError(f"objective_weights are {dict(weights)}; they must be numbers that are not negative and sum to 1")


def in_order(weights: Mapping[str, float], objectives: Sequence[str]) -> tuple[float, ...]:
    """A comparison's weights `[K]` in the order of the objectives, summing to 1; one that is not named has weight 0.

    Raises DataError for a weight of something else.
    """
    other = [name for name, value in weights.items() if value and name not in objectives]
    if other:
        raise DataError(f"objective_weights weighs {other[0]!r}, no objective of the run; {allowed(other[0], objectives)}")
    total = sum(weights.values())
    return tuple(weights.get(name, 0.0) / total for name in objectives)


def shares(weights: Mapping[str, float], objectives: Sequence[str]) -> tuple[float, ...]:
    """What a user asks for, in any scale -> weights `[K]` in the order of the objectives that sum to 1.

    Raises ConfigError for an unknown name, a negative weight, and where all are zero.
    """
    for name, value in weights.items():
        if name not in objectives:
            raise ConfigError(f"weights name {name!r}, which the policy does not know; {allowed(name, objectives)}.")
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"the weight of {name} is {value}; it must be a number that is not negative.")
    total = sum(weights.values())
    if total <= 0:
        raise ConfigError(f"all weights are 0; give one above 0 to any of {', '.join(objectives)}.")
    return tuple(weights.get(name, 0.0) / total for name in objectives)


def grid(objectives: Sequence[str], points: int) -> list[dict[str, float]]:
    """Weights to look at a policy under: of two objectives `points` evenly from the first's corner to the second's, of more
    the corner of each and the middle."""
    count = len(objectives)
    if count == 2:
        rows = [(1 - place / (points - 1), place / (points - 1)) for place in range(points)]
    else:
        rows = [tuple(float(one == other) for other in range(count)) for one in range(count)] + [(1 / count,) * count]
    return [dict(zip(objectives, row, strict=True)) for row in rows]


def are_even(weights: Mapping[str, float]) -> bool:
    """Whether they weigh all objectives alike, or there are none."""
    return len(set(weights.values())) <= 1


def scores_in_order(scores: Mapping[str, Sequence[float]] | None, objectives: Sequence[str]) -> tuple[float, ...]:
    """Each picture's scores by the objectives, `[N·K]`, picture by picture.

    Raises DataError where one is missing or not from 0 to 1, or all of a picture's are 0, which is how a policy is told none.
    """
    for name in objectives:
        if name not in (scores or {}):
            raise DataError(f"the pictures have no score by {name!r}; give every row calibrated scores by all objectives")
    rows = list(zip(*((scores or {})[name] for name in objectives), strict=True))
    for row in rows:
        if not all(0 <= value <= 1 for value in row) or not any(row):
            raise DataError(f"scores of a picture are {row}; they must be from 0 to 1, and not all 0: calibrate them first")
    return tuple(value for row in rows for value in row)


def targets(wanted: Mapping[str, float], objectives: Sequence[str]) -> tuple[float, ...]:
    """Scores that a user asks for -> `[K]` in the order of the objectives. Raises ConfigError."""
    for name in wanted:
        if name not in objectives:
            raise ConfigError(f"targets name {name!r}, which the policy does not know; {allowed(name, objectives)}.")
    missing = [name for name in objectives if name not in wanted]
    if missing:
        raise ConfigError(f"targets say nothing of {missing[0]}; give a score for each of {', '.join(objectives)}.")
    for name, value in wanted.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"the target of {name} is {value}; calibrated scores are from 0 to 1.")
    if not any(wanted.values()):
        raise ConfigError("all targets are 0; give one above 0, because all 0 is how the policy is told none.")
    return tuple(wanted[name] for name in objectives)


def wording(prompt: str, objectives: Sequence[str], weights: Sequence[float]) -> str:
    """The prompt with its weights in words before it, to one digit: `clip 0.7 style 0.3: a red heart`."""
    said = " ".join(f"{name} {value:.1f}" for name, value in zip(objectives, weights, strict=True))
    return f"{said}: {prompt}"
