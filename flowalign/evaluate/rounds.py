"""Rounds held against the base on held-out prompts: win rates of rewards and judges, how far they reach together, diversity,
signs of hacking, the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.evaluate.compare import Estimate, compare, mean_with_interval
from flowalign.evaluate.diversity import pairwise_distance
from flowalign.evaluate.hacking import Series, Signal, divergence, joint, less_diverse
from flowalign.evaluate.pareto import base_minimum, hypervolume_of, steerability
from flowalign.scoring.calibrate import Link, win_rate
from flowalign.scoring.calibration import spread

Array = NDArray[np.float64]
COMBINED, HYPERVOLUME = "combined", "hypervolume"


@dataclass(frozen=True)
class Measured:
    """What one policy draws for held-out prompts, the same prompts and seeds for all policies."""

    prompts: tuple[str, ...]
    """`[n]`, the prompt of each picture."""
    scores: Mapping[str, Array]
    """By measure `[n]`, higher is better."""
    features: Array
    """`[n, d]`, in which diversity is measured."""
    under: tuple[Mapping[str, float], ...] = ()
    """M weights that a steered policy drew the same prompts and seeds under; what stands above is under the even ones."""
    front: Mapping[str, Array] = field(default_factory=dict)
    """By objective `[n, M]`: scores under each of them."""

    @property
    def rows(self) -> dict[str, Array]:
        """Prompt -> its places."""
        return {prompt: np.flatnonzero([each == prompt for each in self.prompts]) for prompt in dict.fromkeys(self.prompts)}


def calibrated(base: Measured, now: Measured, name: str) -> Array:
    """Win rate `[n]` of each picture over the base's pictures of its prompt (CaPO), at the base's spread within a prompt."""
    return _rates(base, now.rows, now.scores[name], name)


def _rates(base: Measured, places: Mapping[str, NDArray[np.int64]], scores: Array, name: str) -> Array:
    """The same of any scores `[n]`; places: rows of each prompt."""
    link = Link("temperature", slope=1 / spread(base.scores[name], base.rows.values()))
    out = np.empty(len(scores))
    for prompt, rows in places.items():
        out[rows] = win_rate(scores[rows], link, base.scores[name][base.rows[prompt]])
    return out


def reach(base: Measured, now: Measured, weights: Mapping[str, float], *, seed: int = 0) -> dict[str, Any] | None:
    """How far a policy reaches by all rewards that are asked for at once, on calibrated ones; None where there is only one.

    The points are means over pictures, one under each weight that the policy was measured under, or only one where it is told
    none; the hypervolume is over the base's minimum (`pareto.base_minimum`). A reward of which less is asked for counts as one
    minus its win rate.
    """
    asked = {name: weight for name, weight in weights.items() if weight}
    if len(asked) < 2:
        return None

    def rates(scores: Array, name: str) -> Array:
        found = _rates(base, now.rows, scores, name)
        return found if asked[name] > 0 else 1 - found

    theirs = np.stack([rates(base.scores[name], name) for name in asked], axis=1)
    drawn = {name: now.front[name] if now.under else now.scores[name][:, None] for name in asked}
    ours = np.stack([np.stack([rates(each, name) for each in drawn[name].T], axis=1) for name in asked], axis=2)
    start, points = base_minimum(theirs), ours.swapaxes(0, 1)
    found: dict[str, Any] = {
        "objectives": list(asked),
        "under": [dict(each) for each in now.under],
        "reference": start.tolist(),
        "points": [[asdict(mean_with_interval(each, now.prompts, seed=seed)) for each in point.T] for point in points],
        HYPERVOLUME: asdict(hypervolume_of(ours, now.prompts, start, seed=seed)),
    }
    if now.under:
        grid = np.array([[each[name] for name in asked] for each in now.under])
        moved = steerability(ours, grid, now.prompts, seed=seed)
        found["steerability"] = {name: _known(each) for name, each in zip(asked, moved, strict=True)}
    return found


def _known(each: Estimate) -> dict[str, float] | None:
    """None where all means are the same, which has no rank."""
    return None if np.isnan(each.value) else asdict(each)


def combined(base: Measured, now: Measured, weights: Mapping[str, float]) -> Array:
    """`[n]`: the weighted mean of calibrated rewards, weights by their size."""
    total = sum(abs(weight) for weight in weights.values()) or 1.0
    return np.sum([weight / total * calibrated(base, now, name) for name, weight in weights.items()], axis=0)


def told(base: Measured, now: Measured, weights: Mapping[str, float], *, seed: int = 0) -> dict[str, Any]:
    """What a round's page says: of every measure whether it was trained on, and how it stands against the base.

    weights: of the rewards that are trained on; other measures are judges.
    """
    measures = {}
    for name, scores in now.scores.items():
        rates = calibrated(base, now, name)
        paired = compare(base.scores[name], scores, groups=now.prompts, resamples=2_000, seed=seed)
        measures[name] = {
            "trained": name in weights,
            "mean": float(scores.mean()),
            "calibrated": asdict(mean_with_interval(rates, now.prompts, seed=seed)),
            "win_rate": asdict(paired.win_rate),
            "difference": asdict(paired.mean_difference),
        }
    one = combined(base, now, weights)
    return {
        "measures": measures,
        COMBINED: asdict(mean_with_interval(one, now.prompts, seed=seed)),
        "reach": reach(base, now, weights, seed=seed),
        "diversity": asdict(mean_with_interval(_diversity(base, now), list(now.rows), seed=seed)),
        "pictures": len(now.prompts),
        "prompts": len(now.rows),
    }


def _diversity(base: Measured, now: Measured) -> Array:
    """Of each prompt, in features scaled by their mean and spread over the base's pictures.

    A feature that hardly varies there, such as a corner that is always white, counts no more than one of a tenth of the usual
    spread: its first speck would else outweigh all others.
    """
    spreads = base.features.std(0)
    scaled = (now.features - base.features.mean(0)) / np.maximum(spreads, 0.1 * spreads.mean() + 1e-12)
    return pairwise_distance(scaled, now.prompts)


def signs(history: Sequence[Measured], weights: Mapping[str, float], *, drop: float, seed: int = 0) -> list[Signal]:
    """Of the last of several policies, the base first: a judge that falls while the rewards rise, more prompts that got worse
    by every measure than better, and diversity that fell by more than `drop` of the base's, each beyond chance."""
    base, now = history[0], history[-1]
    prompts = now.prompts
    rise = Series(np.stack([combined(base, each, weights) for each in history]), prompts)
    judges = [name for name in now.scores if name not in weights]
    found = [
        divergence(rise, Series(np.stack([each.scores[name] for each in history]), prompts), name, seed=seed) for name in judges
    ]
    sides = [np.stack([each.scores[name] for name in now.scores], axis=1) for each in (base, now)]
    found.append(joint(*sides, prompts, seed=seed))
    alike = less_diverse("pictures of a prompt", _diversity(base, base), _diversity(base, now), list(now.rows), seed=seed)
    limit = -drop * alike.numbers["base"]
    beyond = alike.numbers["change"]["high"] < limit
    says = alike.says if beyond else f"Diversity is within its limit of −{100 * drop:.0f} %: {alike.says}"
    return [*found, replace(alike, alarm=beyond, says=says)]


def best_of(rounds: Sequence[Mapping[str, Any]], by: str) -> int | None:
    """Place of the highest of `told`s, by the combined reward, the hypervolume or one measure, the first of equal ones; None of
    none."""

    def value(each: Mapping[str, Any]) -> float:
        if by in (COMBINED, HYPERVOLUME):
            return float((each if by == COMBINED else each["reach"])[by]["value"])
        return float(each["measures"][by]["calibrated"]["value"])

    values = [value(each) for each in rounds]
    return values.index(max(values)) if values else None
