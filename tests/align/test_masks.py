"""Masks in the step: every error is the mean that the mask weighs, and white is the same as none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.align.step import PreferenceStep
from flowalign.errors import ConfigError
from flowalign.rng import Keyed
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]
GIVEN = "switches.mask=given"
EVERY_TERM = ("objective={name: tdpo, beta: 500.0}", "switches.safeguard=0.6", "train.batch_size=4")
"""An objective that reads errors and drift, and a safeguard, which reads the dot of residuals."""


def with_masks(votes: Path, to: Path, draw: Callable[[int, np.ndarray], None]) -> str:
    """The same comparisons with a mask a picture: `draw` makes parts of it black, by the number of the picture."""
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    for number, row in enumerate(rows):
        for place, side in enumerate(("chosen", "rejected")):
            pixels = np.full((32, 32), 255, np.uint8)
            draw(2 * number + place, pixels)
            Image.fromarray(pixels).save(to / f"{number}-{side}-mask.png")
            row |= {side: str(votes.parent / row[side]), f"{side}_mask": f"{number}-{side}-mask.png"}
    (to / "masked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={to / 'masked.jsonl'}"


def parts(number: int, pixels: np.ndarray) -> None:
    pixels[:, 4 * (number % 5) :] = 40 * (number % 3)


@pytest.fixture
def masked(votes: Path, tmp_path: Path) -> str:
    return with_masks(votes, tmp_path, parts)


def shake(ready: Prepared) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def outcome(ready: Prepared) -> list[Tensor]:
    """Loss, metrics and gradients of a policy that has moved."""
    shake(ready)
    loss, metrics = ready.step(ready.first_batch(), Keyed(0))
    return [loss, *metrics.values(), *torch.autograd.grad(loss.sum(), list(trained(ready.policy).values()))]


def test_white_masks_are_no_masks_bit_for_bit(prepared: Make, votes: Path, tmp_path: Path, masked: str) -> None:
    other = [outcome(prepared(masked, *EVERY_TERM, switch)) for switch in ("switches.mask=none", GIVEN)]
    assert not all(torch.equal(*pair) for pair in zip(*other, strict=True))
    white = with_masks(votes, tmp_path, lambda number, pixels: None)
    plain, same = (outcome(prepared(white, *EVERY_TERM, switch)) for switch in ("switches.mask=none", GIVEN))
    assert all(torch.equal(*pair) for pair in zip(plain, same, strict=True))


def test_terms_are_means_weighted_by_the_masks(prepared: Make, masked: str) -> None:
    ready = prepared(masked, GIVEN, *EVERY_TERM)
    shake(ready)
    step, batch = ready.step, ready.first_batch()
    x_t, target, t = step.noised(batch, Keyed(0))
    assert step.reference is not None
    policy, reference = (step.family.predict(each, x_t, t, step.told(batch)).detach() for each in (step.policy, step.reference))
    assert batch.mask is not None
    weight = batch.mask.double().flatten(0, 1)[:, None]
    torch.testing.assert_close(batch.mask.mean((2, 3)), torch.ones(4, 2))
    assert float(batch.mask.min()) == 0
    assert float(batch.mask.max()) > 2

    def mean(one: Tensor, other: Tensor) -> Tensor:
        return (weight * one.double() * other.double()).mean((1, 2, 3)).view(4, 2).float()

    terms = step.terms(batch, Keyed(0))
    torch.testing.assert_close(terms.policy_error, mean(policy - target, policy - target))
    torch.testing.assert_close(terms.reference_error, mean(reference - target, reference - target))
    torch.testing.assert_close(terms.drift, mean(policy - reference, policy - reference))
    chosen, rejected = (weight.sqrt() * (policy - target)).view(4, 2, -1).unbind(1)
    torch.testing.assert_close(terms.residual_dot, (chosen * rejected).mean(1).float())


def test_what_is_black_teaches_nothing(prepared: Make, votes: Path, tmp_path: Path) -> None:
    """Gradients of the error in the prediction, by a policy that is the identity with a parameter for every place."""
    ready = prepared(with_masks(votes, tmp_path, lambda number, pixels: pixels[:, 16:].fill(0)), GIVEN)
    batch = ready.first_batch()
    free = torch.zeros(4, 4, 8, 8, requires_grad=True)
    step = replace(ready.step, family=replace_predict(ready, lambda x_t: x_t + free))
    gradient = torch.autograd.grad(step.terms(batch, Keyed(0)).policy_error.sum(), free)[0]
    assert (gradient[..., 4:] == 0).all()
    assert (gradient[..., :4] != 0).all()


def replace_predict(ready: Prepared, predict: Callable[[Tensor], Tensor]) -> Any:
    class Own(type(ready.family)):  # type: ignore[misc]
        def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
            return predict(x_t)

    family = object.__new__(Own)
    family.__dict__ |= ready.family.__dict__
    return family


def test_a_bank_of_masked_errors_is_one_of_its_own(
    prepared: Make, masked: str, votes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (f"data.cache={tmp_path / 'cache'}", "data.flip=true", "train.batch_size=5")
    ready, live = (prepared(masked, GIVEN, *common, *more) for more in (("reference.bank=2",), ()))
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) < 1e-3
    for batch in islice(ready.batches(0), 4):
        stored, found = (step.terms(batch, Keyed(0)).reference_error for step in (ready.step, live.step))
        torch.testing.assert_close(stored, found, rtol=0, atol=2e-6)

    def ran(self: PreferenceStep, batch: Any, rng: Keyed) -> Any:
        raise RuntimeError("the reference ran")

    monkeypatch.setattr(PreferenceStep, "for_bank", ran)
    prepared(masked, GIVEN, *common, "reference.bank=2")
    with pytest.raises(RuntimeError, match="the reference ran"):
        prepared(masked, "switches.mask=none", *common, "reference.bank=2")
    with_masks(votes, tmp_path, lambda number, pixels: parts(number + 1, pixels))
    with pytest.raises(RuntimeError, match="the reference ran"):
        prepared(masked, GIVEN, *common, "reference.bank=2")


def test_masks_that_are_asked_for_and_not_there_are_refused(prepared: Make) -> None:
    with pytest.raises(ConfigError, match=r"no comparison of data\.train has a mask; fill in the column mask"):
        prepared(GIVEN)


def test_masks_read_nothing_back(prepared: Make, masked: str, no_read_back: Any) -> None:
    ready = prepared(masked, GIVEN, *EVERY_TERM)
    batch = ready.first_batch()
    with no_read_back():
        ready.step(batch, Keyed(0))[0].mean().backward()
