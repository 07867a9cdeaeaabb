"""A β that moves: its rules written out again, that objectives take it, that a resumed run has it, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign import runs
from flowalign.align.adaptive import adaptive, gradient_factor
from flowalign.align.terms import Terms
from flowalign.errors import ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config, Switches
from flowalign.setup import Prepared
from tests.align.test_step import perturb

Make = Callable[..., Prepared]
CPU = torch.device("cpu")


def terms(margins: list[float], preference: float = 1.0) -> Terms:
    """Pairs with these Δ."""
    delta = torch.tensor(margins)
    reference = torch.ones(len(margins), 2)
    error = torch.stack([1 - delta, 1 + delta], dim=1)  # h = ±½Δ each
    return Terms(error, reference, None, torch.full((len(margins),), preference))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_gradient_factor_is_what_the_logistic_loss_has_left() -> None:
    margins = torch.tensor([0.3, -0.1, 0.0], requires_grad=True)
    torch.nn.functional.logsigmoid(7 * margins).sum().backward()
    torch.testing.assert_close(gradient_factor(terms([0.3, -0.1, 0.0]), 7.0), margins.grad / 7)
    assert gradient_factor(terms([0.3], preference=0.25), 7.0).item() == pytest.approx(
        0.25 * sigmoid(-2.1) + 0.75 * sigmoid(2.1), rel=1e-5
    )


def test_target_moves_log_beta_by_the_mean_of_what_is_missing() -> None:
    moving = adaptive(Switches(beta="target", target_factor=0.3), {"beta": 5.0}, CPU, steps=8)
    assert moving is not None
    beta = 5.0
    for step, batches in enumerate([[[0.1, -0.2], [0.3, 0.0]], [[1.0, 1.0], [2.0, 0.5]]], 1):
        for margins in batches:
            moving.observe(terms(margins))
        moving.after(step)
        factors = [sigmoid(-beta * margin) for margins in batches for margin in margins]
        beta *= math.exp(0.2 * (sum(factors) / len(factors) - 0.3))
        assert moving.scalars["beta"].item() == pytest.approx(beta, rel=1e-5)


def test_target_settles_where_the_factor_is_the_target_and_stays_within_ten_times() -> None:
    moving = adaptive(Switches(beta="target", target_factor=0.25), {"beta": 1.0}, CPU, steps=8)
    assert moving is not None
    for step in range(2000):
        moving.observe(terms([0.5, 0.5]))
        moving.after(step)
    assert moving.scalars["beta"].item() == pytest.approx(math.log(3) / 0.5, rel=1e-3)  # σ(−βΔ) = ¼
    for step in range(2000):
        moving.observe(terms([-1.0]))  # never better than ½: β would grow without end
        moving.after(step)
    assert moving.scalars["beta"].item() == pytest.approx(10.0)


def test_batch_beta_follows_how_far_the_last_step_was_above_the_running_mean() -> None:
    moving = adaptive(Switches(beta="batch"), {"beta": 4.0}, CPU, steps=8)
    assert moving is not None
    mean = 0.0
    for step, margins in enumerate([[0.1, 0.3], [0.5, 0.7], [-0.4, 0.0]], 1):
        moving.observe(terms(margins))
        moving.after(step)
        reward = 4 * sum(margins) / 2
        mean = 0.9 * mean + 0.1 * reward
        assert moving.scalars["beta"].item() == pytest.approx(4 * (1 + 0.6 * (reward - mean)), rel=1e-5)
    moving.observe(terms([-50.0]))
    moving.after(4)
    assert moving.scalars["beta"].item() == pytest.approx(0.04)


def test_the_step_trains_with_the_moved_beta_and_reports_it(prepared: Make) -> None:
    ready = prepared("switches.beta=target", "objective.beta=500.0")
    perturb(ready)
    batch, moving = ready.first_batch(), ready.step.adaptive
    assert moving is not None

    def expected(beta: float) -> Tensor:
        return -torch.nn.functional.logsigmoid(beta * ready.step.terms(batch, Keyed(0)).margin)

    loss, _ = ready.step(batch, Keyed(0))
    torch.testing.assert_close(loss, expected(500.0))
    moving.after(1)
    moved = moving.scalars["beta"].item()
    assert moved != pytest.approx(500.0, rel=1e-3)
    loss, metrics = ready.step(batch, Keyed(0))
    torch.testing.assert_close(loss, expected(moved))
    assert metrics["adaptive/beta"].tolist() == pytest.approx([moved] * 2)
    assert metrics["rewards/margins"].tolist() == pytest.approx((500 * ready.step.terms(batch, Keyed(0)).margin).tolist())


@pytest.mark.parametrize("how", ["target", "batch"])
def test_a_stopped_run_goes_on_with_the_beta_it_had(settings: Callable[..., Config], tmp_path: Path, how: str) -> None:
    common = (f"switches.beta={how}", "train.save_every=2", "train.learning_rate=1e-2")
    runs.align(settings(tmp_path / "whole", *common), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=2"), progress=False)
    runs.align(settings(tmp_path / "parts", *common), resume=True, progress=False)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    betas = [[row["train/adaptive/beta"] for row in map(json.loads, each) if "train/adaptive/beta" in row] for each in lines]
    assert betas[0] == betas[1]
    assert len(set(betas[0])) >= 3  # at the first step every margin is 0


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{name: ipo, tau: 50.0}", "'ipo' has no beta"),
        ("{name: simpo}", "'simpo' needs no reference, so that there is no margin"),
        ("{name: epsilon_dpo}", "'epsilon_dpo' moves it already"),
    ],
)
def test_what_has_no_beta_to_move_is_refused(prepared: Make, objective: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"switches.beta 'target' moves objective.beta, but objective.name {said}"):
        prepared("switches.beta=target", f"objective={objective}")


def test_cosine_takes_beta_from_all_to_half_over_the_run() -> None:
    moving = adaptive(Switches(beta="cosine"), {"beta": 6.0}, CPU, steps=8)
    assert moving is not None
    for step in range(10):
        expected = 6 * (0.75 + 0.25 * math.cos(math.pi * min(step, 8) / 8))
        assert moving.scalars["beta"].item() == pytest.approx(expected, rel=1e-5)
        moving.observe(terms([0.1, -3.0]))
        moving.after(step + 1)
    assert moving.scalars["beta"].item() == pytest.approx(3.0)
    assert {name: value.item() for name, value in moving.tensors().items()} == {"adaptive/beta": 3.0, "adaptive/step": 10.0}
