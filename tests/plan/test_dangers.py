"""Each rule on a setting that is known to hold and on one that is known not to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flowalign import plugins
from flowalign.config import parse
from flowalign.plan.dangers import RULES, Facts, dangers
from flowalign.plan.data import Counted
from flowalign.setup import load_objective

COUNTED = Counted(100_000, 1000, 200_000, 100_000, True)
PUBLISHED = (
    "trainable.kind=full",
    "objective.beta=5000",
    "train.learning_rate=2.048e-5",
    "train.accumulation=256",
    "train.steps=500",
)
EMOJI = ("objective.beta=800", "train.learning_rate=5e-4", "train.batch_size=16")


def facts(*overrides: str, counted: Counted = COUNTED) -> Facts:
    config = parse({"model": {"checkpoint": "m"}, "data": {"train": "d"}}, "test", overrides)
    objective, knobs = load_objective(config)
    return Facts(config, knobs, objective.needs, counted, 16_384)


@pytest.mark.parametrize(
    "overrides",
    [
        PUBLISHED,
        EMOJI,
        ("trainable.kind=full", "objective.beta=2000", "train.learning_rate=5e-6", "train.batch_size=16"),
        ("objective.beta=5000", "train.learning_rate=5e-5", "train.batch_size=4", "train.accumulation=16"),
        (*EMOJI, "train.steps=100000", "reference.bank=4", "objective.beta=2000"),
        ("objective.name=ipo", "train.adam_eps=1e-15", "train.learning_rate=1e-4"),
    ],
)
def test_settings_that_hold_are_left_alone(overrides: tuple[str, ...]) -> None:
    assert dangers(facts(*overrides)) == []


@pytest.mark.parametrize(
    ("overrides", "value", "advice"),
    [
        (
            ("trainable.kind=full", "objective.beta=300", "train.learning_rate=2e-5", "train.batch_size=16"),
            "learning_rate 2e-05 with objective.beta 300",
            "set train.learning_rate=5.0e-06 or less, or objective.beta=1207 or more",
        ),
        (
            ("objective.beta=300", "train.learning_rate=6e-4", "train.batch_size=16"),
            "ratio of 2.0e-06",
            "train.learning_rate=3.7e-04 or less",
        ),
        ((*PUBLISHED, "train.learning_rate=2.048e-8"), "1,000 times below", "train.learning_rate=2.05e-05"),
        ((*PUBLISHED, "train.learning_rate=5e-8", "objective.beta=2000"), "1,024 times below", "train.learning_rate=5.12e-05"),
        ((*EMOJI, "train.learning_rate=2e-7"), "learning_rate 2e-07", "from 1e-5 to 5e-4"),
        ((*EMOJI, "objective.beta=1"), "objective.beta 1 looks like", "objective.beta=16384"),
        ((*EMOJI, "train.batch_size=3"), "3 comparisons", "train.accumulation=6"),
        ((*EMOJI, "train.steps=200000"), "200000 sees each of the 100,000 comparisons 32 times", "train.steps=125000"),
        ((*EMOJI, "train.steps=20000", "reference.bank=4"), "costs 4 reference forwards", "reference.bank=null"),
        (("objective.name=ipo", "train.learning_rate=1e-4"), "train.adam_eps 1e-08", "train.adam_eps=1e-15"),
    ],
)
def test_settings_that_do_not_are_named_with_what_to_do(overrides: tuple[str, ...], value: str, advice: str) -> None:
    (sentence,) = dangers(facts(*overrides))
    assert value in sentence
    assert advice in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("name", plugins.names("objectives"))
def test_only_losses_that_are_nearly_flat_are_blind_under_adams_epsilon(name: str) -> None:
    takes = plugins.load("objectives", name).takes
    pictures, chosen = {"pairs": (2, 1), "groups": (4, 2), "lists": (4, 1), "unpaired": (2, 1)}[takes]
    counted = replace(COUNTED, per_comparison=pictures, num_chosen=chosen)
    said = [each for each in dangers(facts(f"objective={{name: {name}}}", counted=counted)) if "adam_eps" in each]
    assert bool(said) == (name in ("ipo", "mipo", "sppo"))
    assert not [
        each
        for each in dangers(facts(f"objective={{name: {name}}}", "train.adam_eps=1e-15", counted=counted))
        if "adam_eps" in each
    ]


def test_processes_count_in_a_step_and_in_the_advice() -> None:
    few = facts(*EMOJI, "train.batch_size=1", "train.steps=400000")
    assert [said for said in dangers(replace(few, processes=16)) if "a step sees" in said] == []
    by_heart, step = dangers(replace(few, processes=6))[::-1]
    assert "a step sees 6 comparisons" in step
    assert "train.accumulation=3 or more" in step
    assert "24 times" in by_heart


def test_a_bank_that_align_refuses_is_said() -> None:
    (sentence,) = dangers(replace(facts(*EMOJI, "reference.bank=1"), needs=frozenset()))
    assert "flowalign align refuses it" in sentence


def test_the_advice_is_itself_left_alone() -> None:
    bad = ("trainable.kind=full", "train.batch_size=16", "train.learning_rate=2e-5", "objective.beta=300")
    for cure in ("train.learning_rate=4.9e-6", "objective.beta=1208"):
        assert dangers(facts(*bad, cure)) == []


def test_what_is_not_known_warns_of_nothing() -> None:
    unknown = Counted(None, None, None, None, False)
    assert dangers(facts(*EMOJI, "train.steps=200000", "reference.bank=4", counted=unknown)) == []
    assert len(RULES) == 8
