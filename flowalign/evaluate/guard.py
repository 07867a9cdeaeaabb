"""The guard against collapse: what it watches in a run's metrics, what it does, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flowalign.settings import Guard as Settings
from flowalign.train.loop import Verdict

Action = Literal["warn", "lower_lr", "rollback", "stop"]
RETURNING = ("rollback", "stop")
"""Policies that need a good state to go back to."""
MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
TIMES = ("t0.00-0.25", "t0.25-0.50", "t0.50-0.75", "t0.75-1.00")
"""Equal parts of [0, 1], 0 clean and 1 noise, in which held-out margins are told apart: `rewards/margins/t0.00-0.25`."""
SIGMAS = 4.0
"""Standard errors by which a held-out share must be beyond chance, whatever its limit."""
CALM = 0.5
"""Of the way to its limit: a state is good where no watch is beyond this."""
SLOWER = "lower train.learning_rate"
HELD = "raise objective.beta, lower train.learning_rate, train fewer steps, or add switches.winner_nll or switches.safeguard"


class Watch(NamedTuple):
    """What a watch says of the value it saw and of its limit, and what to change."""

    says: str
    knob: str


WATCHES = {
    "winner_error": Watch(
        "the error of chosen pictures had risen by {value:.0%} above its lowest (limit {limit:.0%}), so the model runs away "
        "from the rejected pictures and forgets the chosen ones too",
        HELD,
    ),
    "negative_margins": Watch(
        "{value:.0%} of the comparisons trained on had a negative margin (limit {limit:.0%}), so the model learns the opposite "
        "of their labels",
        f"{SLOWER}, or check which picture of a pair is the chosen one",
    ),
    "margin_by_time": Watch(
        "{value:.0%} of the held-out margins in one quarter of the times were negative (limit {limit:.0%}), so the preference "
        "is won at some noise levels and lost at others",
        f"{SLOWER}, or set train.timestep_range to the times that gain",
    ),
    "accuracy": Watch(
        "held-out accuracy had fallen by {value:.2f} from its best (limit {limit:.2f}), so the pairs are learned by heart",
        f"train fewer steps, {SLOWER}, or add comparisons",
    ),
    "grad_norm": Watch("the gradient's norm was {value:.0f} times its running mean (limit {limit:g})", SLOWER),
    "update_norm": Watch(
        "the weights were {value:.0f} times as far from their start as their running mean (limit {limit:g})", SLOWER
    ),
    "non_finite": Watch("a metric became NaN or infinite", f"{SLOWER}, raise objective.beta, or use train.precision=fp32"),
}
MEANS = ("winner/error", "winner/reference_error", ACCURACY, "grad_norm", "update_norm")
"""Training metrics that are averaged over the window."""
SLOTS = (
    *("step", "compared", "weight", "start", "lowest/held", "lowest/trained", "best", "stopped"),
    *(f"sum/{name}" for name in MEANS),
    *(f"{part}/{watch}" for part in ("level", "acted") for watch in WATCHES),
)


@dataclass(frozen=True)
class Event:
    """One thing that was seen and done."""

    watch: str
    value: float
    limit: float
    step: int
    """Where it was seen."""
    action: Action
    rate: float
    """What the learning rate is multiplied with from then on."""

    def line(self) -> dict[str, Any]:
        """As `metrics.jsonl` has it."""
        return {f"guard/{name}": value for name, value in vars(self).items()}


class Guard:
    """Notes metrics and judges them. All it remembers is one tensor that is saved with the run's state.

    A level is a value on the way from where nothing is wrong, 0, to its limit, 1. The same metrics give the same judgements:
    nothing depends on clocks, on processes or on when the run was interrupted.
    """

    def __init__(self, settings: Settings, *, pairs_per_step: int, held_out: int, draws: int, along: bool) -> None:
        """held_out: comparisons of a validation, with so many draws each. along: the run validates before its end, too."""
        self.settings = settings
        self._pairs, self._held_out, self._draws, self._along = pairs_per_step, held_out, draws, along
        self._memory = torch.zeros(len(SLOTS), dtype=torch.float64)
        self._seen: dict[str, tuple[float, float]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, to be restored in place."""
        return {"guard/memory": self._memory}

    @property
    def stopped(self) -> bool:
        """Whether it ended this run, under a policy that does."""
        return self.settings.policy in RETURNING and bool(self._get("stopped"))

    def end(self) -> None:
        """Remember that it ended the run, where memory went back to before that."""
        self._set("stopped", 1.0)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Take note of one line of metrics, `train/…` or `eval/…`, means over all processes."""
        if not all(map(math.isfinite, values.values())):
            self._read("non_finite", 1.0, 0.5)
            return
        groups = {part: {name.removeprefix(f"{part}/"): value for name, value in values.items()} for part in ("train", "eval")}
        if any(name.startswith("eval/") for name in values):
            self._held(groups["eval"])
        else:
            self._trained(step, groups["train"])

    def judge(self, step: int, rate: float, *, good: bool, broken: bool) -> tuple[Verdict, list[Event]]:
        """The verdict, and what was seen and done; events hold the new rate.

        good: there is a good state to go back to. broken: a training metric was not finite, which ends the run in the loop's
        own words unless the policy knows better.
        """
        policy = self.settings.policy
        returns = policy in RETURNING
        if broken:
            self._read("non_finite", 1.0, 0.5)
        seen, self._seen = self._seen, {}
        if policy == "off" or (broken and not returns):
            return "on", []
        new = [watch for watch in seen if self._is_new(watch)]
        if not new:
            calm = all(self._get(f"level/{watch}") <= CALM for watch in WATCHES)
            return "good" if calm and returns else "on", []
        action: Action = policy
        if policy in ("lower_lr", "rollback"):
            lower = rate * self.settings.factor
            spent = lower < self.settings.lowest or (policy == "rollback" and not good)
            action = ("warn" if policy == "lower_lr" else "stop") if spent else policy
            rate = rate if spent else lower
        for watch in new:
            self._set(f"acted/{watch}", self._get(f"level/{watch}"))
        self._set("stopped", float(action == "stop"))
        verdicts: dict[Action, Verdict] = {"rollback": "back", "stop": "stop"}
        return verdicts.get(action, "on"), [Event(watch, *seen[watch], step, action, rate) for watch in new]

    def _trained(self, step: int, values: Mapping[str, float]) -> None:
        cfg, count = self.settings, self._pairs * (step - self._get("step"))
        keep = math.exp(-count / cfg.window)
        if self._get("compared") >= cfg.window:
            for name in ("grad_norm", "update_norm"):
                if name in values and self._mean(name) > 0:
                    self._read(name, values[name] / self._mean(name), cfg.spike, calm=1.0)
        for name in MEANS:
            self._set(f"sum/{name}", keep * self._get(f"sum/{name}") + (1 - keep) * values.get(name, 0.0))
        self._set("weight", keep * self._get("weight") + 1 - keep)
        self._set("compared", self._get("compared") + count)
        self._set("step", step)
        if self._get("compared") < cfg.window:
            return
        if ACCURACY in values:
            self._read("negative_margins", 1 - self._mean(ACCURACY), cfg.negative_margins, calm=0.5)
        if not self._along and "winner/reference_error" in values:
            ratio = self._mean("winner/error") / self._mean("winner/reference_error")
            lowest = min(self._get("lowest/trained") or 1.0, ratio)
            self._set("lowest/trained", lowest)
            self._read("winner_error", ratio - lowest, cfg.winner_error)

    def _held(self, values: Mapping[str, float]) -> None:
        cfg = self.settings
        start = self._get("start") or values["winner/error"]
        self._set("start", start)
        lowest = min(self._get("lowest/held") or start, values["winner/error"])
        self._set("lowest/held", lowest)
        self._read("winner_error", (values["winner/error"] - lowest) / start, cfg.winner_error)
        if ACCURACY in values:
            best = max(self._get("best"), values[ACCURACY])
            self._set("best", best)
            chance = math.sqrt(2) * _chance(self._held_out)
            self._read("accuracy", best - values[ACCURACY], cfg.accuracy_drop, chance=chance)
        parts = [1 - values[f"{ACCURACY}/{label}"] for label in TIMES if f"{ACCURACY}/{label}" in values]
        if parts:
            chance = _chance(self._held_out * min(1.0, self._draws / len(TIMES)))  # draws of one comparison are alike
            self._read("margin_by_time", max(parts), cfg.negative_margins, calm=0.5, chance=chance)

    def _read(self, watch: str, value: float, limit: float | None, calm: float = 0.0, chance: float = 0.0) -> None:
        """calm: the value where nothing is wrong; chance: how far from there it may come by chance."""
        if limit is None:
            return
        limit = max(limit, calm + chance)
        self._set(f"level/{watch}", (value - calm) / (limit - calm))
        self._seen[watch] = (value, limit)

    def _is_new(self, watch: str) -> bool:
        """Beyond the limit, and clearly worse than when something was done about it; a warning is given once."""
        level, acted = self._get(f"level/{watch}"), self._get(f"acted/{watch}")
        return level > 1 and (not acted or (self.settings.policy == "lower_lr" and level > acted + CALM))

    def _mean(self, name: str) -> float:
        return self._get(f"sum/{name}") / self._get("weight")

    def _get(self, slot: str) -> float:
        return self._memory[SLOTS.index(slot)].item()

    def _set(self, slot: str, value: float) -> None:
        self._memory[SLOTS.index(slot)] = value


def _chance(count: float) -> float:
    """How far a share of so many comparisons may be off by chance: `SIGMAS` standard errors of at most ½/√n."""
    return SIGMAS * 0.5 / math.sqrt(max(1.0, count))


def guard_report(policy: str, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the guard did in a run, from the lines of its `metrics.jsonl`: the policy, events, and what they say."""
    names = Event.__dataclass_fields__
    found = [Event(**{name: line[f"guard/{name}"] for name in names}) for line in lines if "guard/watch" in line]
    nothing = "The guard was off." if policy == "off" else "The guard saw nothing."
    return {"policy": policy, "events": [vars(event) for event in found], "says": " ".join(map(sentence, found)) or nothing}


def sentence(event: Event) -> str:
    """One event for people: what was seen, what was done, what to change."""
    watch = WATCHES[event.watch]
    done = {
        "warn": "",
        "lower_lr": f"; the learning rate is now {event.rate:g} of what was set",
        "rollback": f"; the run went back to its last good state with {event.rate:g} of the learning rate",
        "stop": "; the run was ended",
    }[event.action]
    return f"At step {event.step} {watch.says.format(value=event.value, limit=event.limit)}{done}; next time {watch.knob}."
