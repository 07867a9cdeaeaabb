"""What objectives carry from one optimizer step to the next: measured on pairs, averaged over a step, and moved on."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist, fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign import plugins
from flowalign.align.objectives import epsilon_dpo
from flowalign.align.terms import Terms
from tests.align.objective_plain import Comparison, step
from tests.align.objective_rows import comparisons, example

NAMES = ("alpha_dpo", "beta_dpo", "epsilon_dpo", "kto")
KNOBS: dict[str, dict[str, Any]] = {
    "alpha_dpo": {"beta": 40.0, "gamma": 1.0, "alpha": 0.1, "decay": 0.8},
    "beta_dpo": {"beta": 40.0, "gain": 0.7, "keep": 0.6, "decay": 0.8},
    "epsilon_dpo": {"beta": 40.0, "epsilon": 0.7},
    "kto": {"beta": 40.0, "desirable": 1.0, "undesirable": 1.0},
}
CARRIED = {
    "alpha_dpo": {"mean": 0.3, "deviation": 0.6},
    "beta_dpo": {"beta": 35.0, "mean": 0.1, "deviation": 0.7},
    "epsilon_dpo": {"beta": 35.0},
    "kto": {"z0": 0.1},
}


def kept(reward: float) -> float:
    return float(abs(reward - 0.1) <= NormalDist().inv_cdf(0.8) * 0.7)


def expected(c: Comparison, value: Callable[[float], float]) -> float:
    return c.p * value(40 * c.margin) + (1 - c.p) * value(-40 * c.margin)


OBSERVED: dict[str, dict[str, Any]] = {
    "alpha_dpo": {"reward": lambda c: expected(c, lambda reward: reward), "square": lambda c: (40 * c.margin) ** 2},
    "beta_dpo": {
        "reward": lambda c: expected(c, lambda reward: reward),
        "square": lambda c: (40 * c.margin) ** 2,
        "kept": lambda c: expected(c, kept),
        "kept_reward": lambda c: expected(c, lambda reward: kept(reward) * reward),
    },
    "epsilon_dpo": {
        "step": lambda c: c.p * step(c, 0.7) + (1 - c.p) * step(c.other, 0.7),
        "lowered": lambda c: c.p * (step(c, 0.7) > 0) + (1 - c.p) * (step(c.other, 0.7) > 0),
        "raised": lambda c: c.p * (step(c, 0.7) < 0) + (1 - c.p) * (step(c.other, 0.7) < 0),
    },
    "kto": {"log_ratio": lambda c: fmean(c.h)},
}


def carry(name: str) -> Any:
    return plugins.load("objectives", name).carry


def tensors(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def advanced(name: str, means: dict[str, float], **knobs: Any) -> dict[str, float]:
    found = carry(name).advance(tensors(CARRIED[name]), tensors(means), **{**KNOBS[name], **knobs})
    assert all(value.shape == () for value in found.values())
    return {key: float(value) for key, value in found.items()}


def test_these_are_the_objectives_that_carry_something() -> None:
    assert tuple(name for name in plugins.names("objectives") if carry(name) is not None) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_observations_are_their_formulas(name: str) -> None:
    made = example("pairs", 12)
    made.policy_error.requires_grad_()
    found = carry(name).observe(made, tensors(CARRIED[name]), **KNOBS[name])
    assert set(found) == set(OBSERVED[name])
    for key, values in found.items():
        assert not values.requires_grad
        expected = [OBSERVED[name][key](c) for c in comparisons(made)]
        assert values.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert len(set(expected)) > 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_carried_has_the_same_names_at_every_step(name: str) -> None:
    start = carry(name).start(**KNOBS[name])
    means = dict.fromkeys(OBSERVED[name], 0.5)
    assert set(start) == set(CARRIED[name]) == set(advanced(name, means))


def test_epsilon_dpo_moves_beta_by_the_mean_step_and_keeps_it_near_its_start() -> None:
    assert carry("epsilon_dpo").start(beta=40.0, epsilon=0.01) == {"beta": 40.0}
    assert advanced("epsilon_dpo", {"step": 0.25})["beta"] == pytest.approx(35 / (1 + 0.7 * 0.25))
    assert advanced("epsilon_dpo", {"step": 1.0}, epsilon=1e3)["beta"] == 4.0
    assert advanced("epsilon_dpo", {"step": -1.0}, epsilon=0.999)["beta"] == 400.0


def test_beta_dpo_follows_the_lead_of_the_kept_pairs() -> None:
    means = {"reward": 0.5, "square": 0.89, "kept": 0.8, "kept_reward": 0.32}
    mean, spread = 0.8 * 0.1 + 0.2 * 0.5, math.sqrt(0.89 - 0.25)
    found = advanced("beta_dpo", means)
    assert found["mean"] == pytest.approx(mean)
    assert found["deviation"] == pytest.approx(0.8 * 0.7 + 0.2 * spread)
    assert found["beta"] == pytest.approx(40 * (1 + 0.7 * (0.32 / 0.8 - mean)))
    assert advanced("beta_dpo", {**means, "kept_reward": -9.0})["beta"] == pytest.approx(0.4)  # not below a hundredth
    none = advanced("beta_dpo", {**means, "kept": 0.0, "kept_reward": 0.0})
    assert none["beta"] == pytest.approx(40 * (1 - 0.7 * mean))


def test_beta_dpo_keeps_the_share_that_it_is_told_of_normal_margins() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = torch.randn(20_000, generator=generator) * 0.7 / 40 + 0.1 / 40
    made = Terms(torch.stack([-margin, margin], 1), torch.zeros(20_000, 2), None, torch.ones(20_000))
    found = carry("beta_dpo").observe(made, tensors(CARRIED["beta_dpo"]), **KNOBS["beta_dpo"])
    assert float(found["kept"].mean()) == pytest.approx(0.6, abs=0.01)
    everything = carry("beta_dpo").observe(made, tensors(CARRIED["beta_dpo"]), **{**KNOBS["beta_dpo"], "keep": 1.0})
    assert float(everything["kept"].mean()) == 1.0


def test_alpha_dpo_carries_running_moments() -> None:
    found = advanced("alpha_dpo", {"reward": 0.5, "square": 0.89})
    assert found["mean"] == pytest.approx(0.8 * 0.3 + 0.2 * 0.5)
    assert found["deviation"] == pytest.approx(0.8 * 0.6 + 0.2 * 0.8)
    assert advanced("alpha_dpo", {"reward": 0.5, "square": 0.2})["deviation"] == pytest.approx(0.48)  # rounding below 0


def test_kto_carries_the_mean_log_ratio_where_it_is_positive() -> None:
    assert advanced("kto", {"log_ratio": 0.25}) == {"z0": 0.25}
    assert advanced("kto", {"log_ratio": -0.25}) == {"z0": 0.0}


def test_epsilon_dpos_closed_form_is_the_comparison_of_three_models() -> None:
    """10,000 pairs of predictions, and both policies that lie a little further from and nearer to the reference."""
    generator = torch.Generator().manual_seed(0)
    policy, reference, target = (torch.randn(10_000, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    policy = reference + torch.rand(10_000, 1, 1, generator=generator) * (policy - reference)
    epsilon = 0.3

    def size(difference: Tensor) -> Tensor:
        return difference.square().mean(2)

    def order(prediction: Tensor) -> Tensor:
        likelihood = -0.5 * size(prediction - target)
        return likelihood[:, 0] - likelihood[:, 1]

    further = order((1 + epsilon) * policy - epsilon * reference)
    nearer = order((1 - epsilon) * policy + epsilon * reference)
    here = order(policy)
    expected = ((further > here) & (here > nearer)).double() - ((nearer > here) & (here > further)).double()
    made = Terms(size(policy - target), size(reference - target), size(policy - reference), torch.ones(10_000))
    assert torch.equal(epsilon_dpo.step(made, epsilon=epsilon), expected)
    assert all((expected == value).sum() > 500 for value in (-1, 0, 1))


def test_epsilon_dpo_reverses_the_step_of_a_reversed_vote() -> None:
    made = example("pairs", 12)
    assert torch.equal(epsilon_dpo.step(made.swapped(), epsilon=0.7), -epsilon_dpo.step(made, epsilon=0.7))
