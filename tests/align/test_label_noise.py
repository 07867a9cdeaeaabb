"""Votes that are turned around on purpose: which ones, that they stay turned, and what the loss makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign import plugins, runs
from flowalign.align.step import PreferenceStep
from flowalign.align.terms import Terms
from flowalign.errors import CheckpointError, ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]
NOISE = "switches.label_noise=0.4"


def labels(step: PreferenceStep, ready: Prepared, count: int, seed: int = 0) -> Tensor:
    """Of `count` comparisons that all hold a vote for their first picture."""
    batch = replace(ready.first_batch(), ids=tuple(range(count)), draws=(3,) * count, preference=torch.ones(count))
    return step._labels(batch, Keyed(seed))


def shake(ready: Prepared) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_as_many_votes_as_asked_for_are_turned_and_none_in_validation(prepared: Make) -> None:
    ready = prepared(NOISE)
    found = labels(ready.step, ready, 20_000)
    assert set(found.tolist()) == {0.0, 1.0}
    assert float(found.mean()) == pytest.approx(0.6, abs=0.015)  # four standard deviations
    assert labels(ready.step.on_held_out(), ready, 20_000).eq(1).all()
    assert torch.equal(found, labels(ready.step, ready, 20_000))
    assert float((found != labels(ready.step, ready, 20_000, seed=1)).float().mean()) == pytest.approx(2 * 0.4 * 0.6, abs=0.02)


def test_a_comparison_keeps_its_turned_vote_in_every_epoch(prepared: Make) -> None:
    ready = prepared(NOISE, "train.batch_size=4")
    seen: dict[int, set[float]] = {}
    for batch in islice(ready.batches(0), 9):
        for example, label in zip(batch.ids, ready.step._labels(batch, Keyed(0)).tolist(), strict=True):
            seen.setdefault(example, set()).add(label)
    assert len(seen) == 12
    assert all(len(each) == 1 for each in seen.values())
    assert {label for each in seen.values() for label in each} == {0.0, 1.0}


def test_a_turned_vote_is_the_same_pair_the_other_way_round(prepared: Make) -> None:
    plain, noisy = prepared("train.batch_size=12"), prepared(NOISE, "train.batch_size=12")
    assert noisy.step.self_test(noisy.first_batch(), Keyed(0)) == 0.0
    for ready in (plain, noisy):
        shake(ready)
    batch = plain.first_batch()
    terms, turned = plain.step.terms(batch, Keyed(0)), noisy.step.terms(batch, Keyed(0))
    other = terms.preference != turned.preference
    assert 0 < int(other.sum()) < 12
    exchanged = replace(terms.swapped(), preference=terms.preference)  # the rejected picture was voted for
    expected = torch.where(other, plain.step.loss(exchanged), plain.step.loss(terms))
    torch.testing.assert_close(noisy.step.loss(turned), expected)
    assert float((plain.step.loss(exchanged) - plain.step.loss(terms)).detach().abs().min()) > 1e-5


def test_rdpo_that_knows_the_rate_has_the_mean_of_dpo_under_true_votes(prepared: Make) -> None:
    count = 40_000
    ready = prepared(NOISE)
    seen = labels(ready.step, ready, count)
    errors = torch.tensor([[0.9, 1.3]]).expand(count, 2)
    rdpo, dpo = (plugins.load("objectives", name) for name in ("rdpo", "dpo"))
    noisy = rdpo(Terms(errors, torch.ones(count, 2), None, seen), beta=5.0, flips=0.4)
    plain = dpo(Terms(errors, torch.ones(count, 2), None, seen), beta=5.0)
    true = float(dpo(Terms(errors, torch.ones(count, 2), None, torch.ones(count)), beta=5.0).mean())
    assert float(noisy.mean()) == pytest.approx(true, abs=4 * float(noisy.std()) / count**0.5)
    assert abs(float(plain.mean()) - true) > 0.3


def test_a_stopped_run_goes_on_with_the_same_turned_votes_and_noise(settings: Callable[..., Config], tmp_path: Path) -> None:
    common = (NOISE, "switches.noise=inverted", "switches.inversion_steps=1", "train.save_every=2", "sample.count=1")
    runs.align(settings(tmp_path / "whole", *common, "train.steps=3"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=2"), progress=False)
    with pytest.raises(CheckpointError, match=r"switches\.label_noise was 0\.4 and is 0\.1"):
        runs.align(settings(tmp_path / "parts", *common, "switches.label_noise=0.1"), resume=True, progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=3"), resume=True, progress=False)
    whole, parts = ((tmp_path / name / "weights/pytorch_lora_weights.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("switches.label_noise=0.6",), "switches.label_noise cannot be 0.6"),
        ((NOISE, "switches.safeguard=0.9"), "turns votes around, and switches.safeguard"),
        ((NOISE, "switches.winner_nll=0.1"), "turns votes around, and switches.safeguard"),
        ((NOISE, "objective={name: dro}"), "objective.name 'dro' reads none"),
    ],
)
def test_what_label_noise_does_not_go_with(prepared: Make, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(*more)
