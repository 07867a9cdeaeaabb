"""The guard on metrics that a test makes up: each watch speaks for a bad run and not for its healthy twin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from flowalign import config, yaml_text
from flowalign.errors import ConfigError
from flowalign.evaluate.guard import TIMES, WATCHES, Event, Guard, guard_report
from flowalign.settings import Guard as Settings

Line = tuple[int, dict[str, float]]


def make(along: bool = True, held_out: int = 400, **settings: Any) -> Guard:
    """With the limits that the sequences below are made for."""
    chosen = Settings(**{"winner_error": 0.2} | settings)
    return Guard(chosen, pairs_per_step=16, held_out=held_out, draws=4, along=along)


def trained(step: int, **changes: float) -> Line:
    """One line of training, every ten steps."""
    values = {"accuracy": 0.8, "error": 0.3, "reference": 0.3, "grad_norm": 2.0, "update_norm": 0.01 * step} | changes
    names = {"accuracy": "rewards/accuracies", "error": "winner/error", "reference": "winner/reference_error"}
    return step, {"train/loss": 0.5} | {f"train/{names.get(name, name)}": value for name, value in values.items()}


def held(step: int, *, error: float = 0.3, accuracy: float = 0.8, parts: tuple[float, ...] = (0.8,) * 4) -> Line:
    values = {"eval/loss": 0.5, "eval/winner/error": error, "eval/rewards/accuracies": accuracy}
    return step, values | {f"eval/rewards/accuracies/{label}": part for label, part in zip(TIMES, parts, strict=True)}


def run(guard: Guard, lines: list[Line]) -> Iterator[Event]:
    """Events of a run that has always a good state to go back to."""
    rate = 1.0
    for step, values in lines:
        guard.note(step, values)
        _, events = guard.judge(step, rate, good=True, broken=False)
        rate = events[-1].rate if events else rate
        yield from events


STEPS = range(10, 310, 10)
START = held(0, accuracy=0.5, parts=(0.5,) * 4)
SEQUENCES: dict[str, tuple[dict[str, Any], list[Line], list[Line]]] = {
    "winner_error": (
        {},
        [START, held(100, error=0.33), held(200, error=0.37)],
        [START, held(100, error=0.33), held(200, error=0.35)],
    ),
    "winner_error in training": (
        {"along": False},
        [trained(step, error=0.3 + 0.001 * step) for step in STEPS],
        [trained(step, error=0.3 + 0.0001 * step) for step in STEPS],
    ),
    "winner_error in training against a reference at hand": (
        {"along": False},  # pictures that are hard to denoise raise both errors, and say nothing
        [trained(step, error=0.3 + 0.001 * step, reference=0.3) for step in STEPS],
        [trained(step, error=0.3 + 0.001 * step, reference=0.3 + 0.001 * step) for step in STEPS],
    ),
    "negative_margins": (
        {},
        [trained(step, accuracy=0.35) for step in STEPS],
        [trained(step, accuracy=0.45) for step in STEPS],
    ),
    "margin_by_time": (
        {},
        [START, held(100, accuracy=0.75, parts=(0.9, 0.9, 0.9, 0.3))],
        [START, held(100, accuracy=0.75, parts=(0.9, 0.9, 0.75, 0.45))],
    ),
    "accuracy": (
        {},
        [START, held(100, accuracy=0.9), held(200, accuracy=0.7)],
        [START, held(100, accuracy=0.7), held(200, accuracy=0.9)],
    ),
    "grad_norm": (
        {},
        [trained(step, grad_norm=30.0 if step == 200 else 2.0) for step in STEPS],
        [trained(step, grad_norm=2.0 + step / 10) for step in STEPS],
    ),
    "update_norm": (
        {},
        [trained(step, update_norm=0.01 * step if step < 200 else 50.0) for step in STEPS],
        [trained(step, update_norm=0.05 * step) for step in STEPS],
    ),
    "non_finite": ({}, [START, held(100, error=math.nan)], [START, held(100)]),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_each_watch_speaks_for_the_bad_run_alone(name: str) -> None:
    settings, bad, healthy = SEQUENCES[name]
    events = list(run(make(**settings), bad))
    assert [event.watch for event in events] == [name.partition(" ")[0]]  # once, and no other watch
    assert events[0].value > events[0].limit
    assert events[0].step > bad[0][0]
    assert list(run(make(**settings), healthy)) == []


def test_every_watch_has_a_sequence() -> None:
    assert {name.partition(" ")[0] for name in SEQUENCES} == set(WATCHES)


@pytest.mark.parametrize(
    ("watch", "switch"),
    [
        ("winner_error", "winner_error"),
        ("negative_margins", "negative_margins"),
        ("margin_by_time", "negative_margins"),
        ("accuracy", "accuracy_drop"),
        ("grad_norm", "spike"),
        ("update_norm", "spike"),
    ],
)
def test_a_watch_with_limit_null_says_nothing(watch: str, switch: str) -> None:
    settings, bad, _ = SEQUENCES[watch]
    assert list(run(make(**settings, **{switch: None}), bad)) == []


def test_values_and_limits_are_what_was_written() -> None:
    _, bad, _ = SEQUENCES["winner_error"]
    (event,) = run(make(), bad)
    assert (event.value, event.limit, event.step) == (pytest.approx(0.37 / 0.3 - 1), 0.2, 200)
    _, bad, _ = SEQUENCES["accuracy"]
    (event,) = run(make(held_out=400), bad)
    assert (event.value, event.limit) == (pytest.approx(0.2), pytest.approx(4 * math.sqrt(2 * 0.25 / 400)))
    assert list(run(make(held_out=400, accuracy_drop=0.25), bad)) == []
    assert list(run(make(held_out=100), bad)) == []  # so few comparisons can be off by as much


KNOWN = {  # step: rise of the held-out error of chosen pictures, accuracy; 0.3653 before training (docs/guard.md)
    "β 300, rate 2e-5": {
        **{25: (-0.0075, 0.64), 50: (-0.0108, 0.76), 75: (-0.0086, 0.83), 100: (-0.0049, 0.88), 125: (0.0005, 0.91)},
        **{150: (0.0070, 0.94), 175: (0.0109, 0.95), 200: (0.0144, 0.95), 250: (0.0164, 0.97), 300: (0.0178, 0.98)},
    },
    "β 300, rate 1e-4": {10: (-0.0080, 0.65), 20: (-0.0114, 0.77), 30: (-0.0042, 0.88), 40: (0.0132, 0.93), 50: (0.0157, 0.95)},
    "the demo": {40: (-0.0084, 0.67), 80: (-0.0115, 0.79), 120: (-0.0132, 0.86), 160: (-0.0135, 0.88)},
}


@pytest.mark.parametrize(("name", "seen"), [("β 300, rate 2e-5", [175]), ("β 300, rate 1e-4", [40]), ("the demo", [])])
def test_runs_that_collapsed_are_seen_while_their_accuracy_rises_and_one_that_held_is_not(name: str, seen: list[int]) -> None:
    guard = Guard(Settings(), pairs_per_step=16, held_out=241, draws=1, along=True)
    start = (0, {"eval/loss": 0.69, "eval/winner/error": 0.3653, "eval/rewards/accuracies": 0.5})
    lines = [
        (step, {"eval/loss": 0.5, "eval/winner/error": 0.3653 + rise, "eval/rewards/accuracies": accuracy})
        for step, (rise, accuracy) in KNOWN[name].items()
    ]
    assert [(event.watch, event.step) for event in run(guard, [start, *lines])] == [("winner_error", step) for step in seen]


def test_a_rise_counts_from_the_lowest() -> None:
    bad = [START, held(100, error=0.24), held(200, error=0.306)]
    (event,) = run(make(), bad)
    assert event.value == pytest.approx((0.306 - 0.24) / 0.3)


def test_in_training_too_a_rise_counts_from_the_lowest() -> None:
    falling = [trained(step, error=0.3 - 0.0006 * step) for step in range(10, 160, 10)]
    rising = [trained(step, error=0.3) for step in range(160, 310, 10)]
    (event,) = run(make(along=False, window=160), [held(0, error=0.2), *falling, *rising])
    assert 0.2 < event.value < 0.3


def test_a_mean_over_the_window_by_hand() -> None:
    """Two lines of 10 steps, window of 320 comparisons: weights e^-0.5 times as much for what is older."""
    guard = make(along=False, window=320, winner_error=0.01)
    lines = [trained(10, error=0.3, reference=0.3), trained(20, error=0.36, reference=0.3)]
    (event,) = run(guard, lines)
    old = math.exp(-0.5)
    assert event.step == 20
    assert event.value == pytest.approx((0.3 * old + 0.36) / (0.3 * old + 0.3) - 1)


@pytest.mark.parametrize("log_every", [1, 5, 20])
def test_how_often_is_logged_does_not_decide(log_every: int) -> None:
    """The same figures in finer and coarser lines are seen at the same place, up to a line."""
    steps = range(log_every, 301, log_every)
    (event,) = run(make(along=False), [trained(step, error=0.3 * (1 + 0.002 * step)) for step in steps])
    assert 115 <= event.step <= 115 + 2 * log_every + 20


def test_noise_neither_speaks_nor_silences() -> None:
    """Small batches, few held-out comparisons, a model that knows nothing: what is read is coin flips."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        flips = [trained(step, accuracy=rng.binomial(160, 0.5) / 160, grad_norm=float(rng.lognormal(0, 0.5))) for step in STEPS]
        chance = [
            held(step, accuracy=rng.binomial(240, 0.5) / 240, parts=tuple(rng.binomial(60, 0.5, 4) / 60)) for step in STEPS
        ]
        guard = make(held_out=60)
        assert list(run(guard, sorted(flips + chance, key=lambda line: line[0]))) == []
        wrong = [trained(step, accuracy=rng.binomial(160, 0.33) / 160) for step in STEPS]
        assert [event.watch for event in run(make(), wrong)] == ["negative_margins"]


def test_the_first_comparisons_are_not_judged() -> None:
    bad = [trained(step, accuracy=0.2) for step in STEPS]
    assert next(run(make(window=500), bad)).step == 40  # 640 comparisons, the first line with as many as the window
    assert next(run(make(window=160), bad)).step == 10


RISING = [START, *(held(step, error=0.3 * (1 + 0.003 * step)) for step in STEPS)]


def test_off_says_nothing_and_warn_once() -> None:
    assert list(run(make(policy="off"), RISING)) == []
    (event,) = run(make(policy="warn"), RISING)
    assert (event.action, event.rate, event.step) == ("warn", 1.0, 70)


def test_lower_lr_lowers_again_where_it_gets_clearly_worse_and_no_further_than_the_lowest() -> None:
    events = list(run(make(policy="lower_lr", factor=0.5, lowest=0.2), RISING))
    assert [event.rate for event in events[:3]] == [0.5, 0.25, 0.25]
    assert [event.action for event in events[:3]] == ["lower_lr", "lower_lr", "warn"]
    levels = [event.value / event.limit for event in events]
    assert all(after > before + 0.5 for before, after in pairwise(levels))
    still = [START, *(held(step, error=0.3 * 1.3) for step in STEPS)]
    assert len(list(run(make(policy="lower_lr"), still))) == 1  # bad, and no worse than when the rate was lowered


def test_a_rollback_needs_a_good_state_and_a_rate_that_can_be_lowered() -> None:
    def verdict(rate: float, good: bool) -> tuple[str, str, float]:
        guard = make(policy="rollback", factor=0.5, lowest=0.2)
        guard.note(*START)
        assert guard.judge(0, rate, good=False, broken=False) == ("good", [])
        guard.note(*held(50, error=0.5))
        said, (event,) = guard.judge(50, rate, good=good, broken=False)
        assert guard.stopped is (said == "stop")
        return said, event.action, event.rate

    assert verdict(1.0, True) == ("back", "rollback", 0.5)
    assert verdict(0.4, True) == ("back", "rollback", 0.2)
    assert verdict(0.3, True) == ("stop", "stop", 0.3)
    assert verdict(1.0, False) == ("stop", "stop", 1.0)


@pytest.mark.parametrize(
    ("policy", "said"), [("off", "on"), ("warn", "on"), ("lower_lr", "on"), ("rollback", "back"), ("stop", "stop")]
)
def test_what_is_not_finite_in_training(policy: str, said: str) -> None:
    """Under the first three the loop's own error ends the run."""
    guard = make(policy=policy)
    verdict, events = guard.judge(30, 1.0, good=True, broken=True)
    assert verdict == said
    assert [event.watch for event in events] == (["non_finite"] if said != "on" else [])


def test_a_state_is_good_where_nothing_is_half_way_to_its_limit() -> None:
    for policy, good in (("off", "on"), ("warn", "on"), ("lower_lr", "on"), ("rollback", "good"), ("stop", "good")):
        guard = make(policy=policy)
        verdicts = []
        for error in (0.3, 0.32, 0.335, 0.29):
            guard.note(*held(50, error=error))
            verdicts.append(guard.judge(50, 1.0, good=False, broken=False)[0])
        assert verdicts == [good, good, "on", good]


def test_what_it_remembers_is_its_tensors() -> None:
    """Cut anywhere and taken up by another one, a run is judged as it would have been."""
    lines = sorted(RISING + [trained(step, error=0.3 * (1 + 0.003 * step)) for step in STEPS], key=lambda line: line[0])
    whole = list(run(make(policy="lower_lr"), lines))
    assert whole
    for cut in range(len(lines)):
        first, second = make(policy="lower_lr"), make(policy="lower_lr")
        before = list(run(first, lines[:cut]))
        for name, tensor in second.tensors().items():
            tensor.copy_(first.tensors()[name])
        after, rate = [], before[-1].rate if before else 1.0
        for step, values in lines[cut:]:
            second.note(step, values)
            events = second.judge(step, rate, good=True, broken=False)[1]
            rate = events[-1].rate if events else rate
            after += events
        assert before + after == whole
    assert all(tensor.dtype == torch.float64 for tensor in make().tensors().values())


def test_objectives_without_a_reference_are_held_against_their_start() -> None:
    lines = [(0, {"eval/loss": 1.0, "eval/winner/error": 0.3}), (9, {"eval/loss": 1.0, "eval/winner/error": 0.4})]
    (event,) = run(make(), lines)
    assert (event.watch, event.value) == ("winner_error", pytest.approx(1 / 3))
    bare = [(step, {"train/loss": 1.0, "train/winner/error": 0.3 + step, "train/grad_norm": 1.0}) for step in STEPS]
    assert list(run(make(along=False), bare)) == []


def test_the_report_says_what_happened_and_what_to_turn() -> None:
    lines = [{"step": step, **values} for step, values in RISING]
    assert guard_report("warn", lines) == {"policy": "warn", "events": [], "says": "The guard saw nothing."}
    assert guard_report("off", lines)["says"] == "The guard was off."
    (event,) = run(make(), RISING)
    found = guard_report("warn", [*lines, {"step": event.step, **event.line()}])
    assert found["events"] == [vars(event)]
    assert found["says"] == (
        "At step 70 the error of chosen pictures had risen by 21% above its lowest (limit 20%), so the model "
        "runs away from the rejected pictures and forgets the chosen ones too; next time raise objective.beta, lower "
        "train.learning_rate, train fewer steps, or add switches.winner_nll or switches.safeguard."
    )


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize(("action", "done"), [("lower_lr", "is now 0.5 of"), ("rollback", "went back"), ("stop", "was ended")])
def test_every_event_can_be_said_in_one_sentence(watch: str, action: Any, done: str) -> None:
    said = guard_report("warn", [Event(watch, 0.7, 0.6, 40, action, 0.5).line()])["says"]
    assert said.startswith("At step 40 ")
    assert done in said
    assert said.count(". ") == 0
    assert said.endswith(".")


@pytest.mark.parametrize("word", ["off", "'off'", "Off", "false"])
def test_off_is_a_word_in_yaml_too(word: str) -> None:
    tree = {"model": {"checkpoint": "a"}, "data": {"train": "b"}}
    settings = config.parse(tree, "test", [f"guard.policy={word}"])
    assert settings.guard.policy == "off"
    assert config.parse(yaml_text.read(config.dump(settings))) == settings


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("guard.policy=true", "guard.policy cannot be true; allowed: lower_lr, off, rollback, stop, warn."),
        ("guard.policy=rolback", "guard.policy cannot be 'rolback'; did you mean 'rollback'?"),
        ("guard.winner_error=0", "guard.winner_error cannot be 0"),
        ("guard.negative_margins=0.5", "guard.negative_margins cannot be 0.5"),
        ("guard.accuracy_drop=1", "guard.accuracy_drop cannot be 1"),
        ("guard.spike=1", "guard.spike cannot be 1"),
        ("guard.window=0", "guard.window cannot be 0"),
        ("guard.factor=1", "guard.factor cannot be 1"),
        ("guard.lowest=0", "guard.lowest cannot be 0"),
        ("guard.limit=2", "guard.limit is not a setting; "),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse({"model": {"checkpoint": "a"}, "data": {"train": "b"}}, "test", [override])
    assert said in str(error.value)
