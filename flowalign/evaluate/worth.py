"""What a flow is worth: its pictures against those of best-of-n, at equal calls of the generator and at equal seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flowalign.errors import DataError
from flowalign.evaluate.best_of import best_of_weights
from flowalign.evaluate.compare import Estimate, mean_with_interval

Array = NDArray[np.float64]
BOTH = "both"
"""The reward that is the mean of all, each standardised over the pictures before the flow."""
Way = Literal["best of n", "flow", "flow, then best of n", "best of n, then flow"]


@dataclass(frozen=True)
class Seconds:
    """Of one picture, one at a time."""

    draw: float
    """A call of the generator, its answer over HTTP included."""
    flow: float
    """What the flow adds to that."""
    choose: float
    """Scoring by the rewards that choose; nothing is scored where there is no choice."""


@dataclass(frozen=True)
class Scored:
    """N pictures of each of P prompts, before and after the flow, seed by seed; all arrays are `[P, N]`."""

    judged: Mapping[str, tuple[Array, Array]]
    """By judge: before, after. `style` is a probability, its share above ½ counts; of others the mean does."""
    rewards: Mapping[str, tuple[Array, Array]]
    """By reward: before, after; higher is better."""
    seconds: Seconds

    def __post_init__(self) -> None:
        shapes = {each.shape for pair in (*self.judged.values(), *self.rewards.values()) for each in pair}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise DataError(f"scores have shapes {sorted(shapes)}; give all of them as [prompts, seeds].")

    @property
    def draws(self) -> int:
        return int(next(iter(self.judged.values()))[0].shape[1])

    def reward(self, name: str) -> tuple[Array, Array]:
        """A reward before and after, or the mean of all."""
        if name != BOTH:
            return self.rewards[name]
        sides: list[Array] = []
        for side in (0, 1):
            scaled = [(pair[side] - pair[0].mean()) / max(pair[0].std(), 1e-12) for pair in self.rewards.values()]
            sides.append(np.mean(scaled, axis=0))
        return sides[0], sides[1]

    def quality(self, judge: str) -> tuple[Array, Array]:
        """What counts of a judge, before and after."""
        before, after = self.judged[judge]
        return ((before > 0.5) * 1.0, (after > 0.5) * 1.0) if judge == "style" else (before, after)


@dataclass(frozen=True)
class Arm:
    """One way to get a picture."""

    way: Way
    n: int
    chooser: str | None
    """The reward that chooses; None where there is no choice."""
    calls: int
    """Of the generator, for a picture that is kept."""
    seconds: float
    quality: Mapping[str, Estimate]
    """By judge, mean over prompts with its interval."""
    over_flow: Mapping[str, Estimate]
    """By judge, minus that of the flow alone, paired by prompt."""

    @property
    def name(self) -> str:
        if self.n == 1:
            return "flow" if "flow" in self.way else "generator"
        return self.way.replace("best of n", f"best of {self.n} by {self.chooser}")


def arms(scored: Scored, counts: Sequence[int] = (1, 2, 4, 8)) -> list[Arm]:
    """The generator and the flow alone, then every way to combine them with a choice, by every reward and n that there is.

    Means are over all subsets of n of the pictures drawn, see `best_of_weights`; intervals are over prompts.
    """
    found = []
    alone = {judge: scored.quality(judge)[1].mean(1) for judge in scored.judged}
    cost, groups = scored.seconds, range(len(next(iter(alone.values()))))

    def arm(way: Way, n: int, chooser: str | None, seconds: float, weights: Array, side: int) -> Arm:
        got = {judge: (weights * scored.quality(judge)[side]).sum(1) for judge in scored.judged}
        return Arm(
            way,
            n,
            chooser,
            n,
            seconds,
            {judge: mean_with_interval(each, groups) for judge, each in got.items()},
            {judge: mean_with_interval(each - alone[judge], groups) for judge, each in got.items()},
        )

    for way, n, chooser in _ways(scored, counts):
        if chooser is None:
            even = np.full((len(groups), scored.draws), 1 / scored.draws)
            found.append(arm(way, 1, None, cost.draw + (cost.flow if way == "flow" else 0), even, int(way == "flow")))
            continue
        before, after = (best_of_weights(side, n) for side in scored.reward(chooser))
        choice = n * (cost.draw + cost.choose)
        if way == "best of n":
            found.append(arm(way, n, chooser, choice, before, 0))
        elif way == "best of n, then flow":
            found.append(arm(way, n, chooser, choice + cost.flow, before, 1))
        else:
            found.append(arm(way, n, chooser, choice + n * cost.flow, after, 1))
    return found


def _ways(scored: Scored, counts: Sequence[int]) -> Iterator[tuple[Way, int, str | None]]:
    yield "best of n", 1, None
    yield "flow", 1, None
    for chooser in (*scored.rewards, *([BOTH] if len(scored.rewards) > 1 else [])):
        for n in counts:
            if 1 < n <= scored.draws:
                yield "best of n", n, chooser
                yield "best of n, then flow", n, chooser
                yield "flow, then best of n", n, chooser


def affordable(found: Sequence[Arm], seconds: float) -> list[Arm]:
    """For every reward the best-of-n of the largest n that takes no more than so many seconds; n = 1 is the generator alone."""
    plain = [each for each in found if each.way == "best of n"]
    choosers = list(dict.fromkeys(each.chooser for each in plain if each.chooser is not None)) or [None]
    out = {}
    for chooser in choosers:
        fitting = [each for each in plain if each.n == 1 or (each.chooser == chooser and each.seconds <= seconds)]
        best = max(fitting, key=lambda each: each.n)
        out[best.name] = best
    return list(out.values())


def standing(arm: Arm) -> dict[str, int]:
    """By judge, how an arm stands to the flow alone: +1 better, −1 worse, 0 where the interval holds 0, but for rounding."""
    return {judge: int(each.low > 1e-9) - int(each.high < -1e-9) for judge, each in arm.over_flow.items()}


def beats(arm: Arm) -> bool:
    """Whether an arm is better than the flow alone by one judge at least, and worse by none."""
    signs = standing(arm).values()
    return max(signs) > 0 and min(signs) >= 0


def loses(arm: Arm) -> bool:
    """Whether it is worse by one judge at least, and better by none."""
    signs = standing(arm).values()
    return min(signs) < 0 and max(signs) <= 0


def rows(found: Sequence[Arm]) -> list[dict[str, Any]]:
    """Arms as JSON: name, way, n, chooser, calls, seconds, and of every judge a value, an interval and that over the flow."""

    def told(each: Estimate) -> list[float]:
        return [each.value, each.low, each.high]

    return [
        {
            "name": arm.name,
            "way": arm.way,
            "n": arm.n,
            "chooser": arm.chooser,
            "calls": arm.calls,
            "seconds": arm.seconds,
            "quality": {judge: told(each) for judge, each in arm.quality.items()},
            "over_flow": {judge: told(each) for judge, each in arm.over_flow.items()},
        }
        for arm in found
    ]
