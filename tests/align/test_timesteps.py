"""Times: how evenly each sampler spreads them, and that learned importance changes the noise of a gradient, not its mean."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign import runs
from flowalign.align.objectives.dpo import dpo
from flowalign.align.step import PreferenceStep
from flowalign.align.terms import Objective, Terms, needs
from flowalign.align.timesteps import BINS, FLOOR, TIMESTEPS, Importance, Sampler, squared_gradient
from flowalign.data.batch import Batch, Conditioning
from flowalign.errors import CheckpointError, ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.checkpoint import states
from flowalign.train.trainable import trained
from flowalign.watch import validation

Make = Callable[..., Prepared]
LEARNING = "train.timesteps=importance"


def positions(count: int, start: int = 0) -> Batch:
    """A batch of which samplers read ids, draws and positions."""
    empty, places = torch.zeros(count, 2, 1, 2, 2), tuple(range(start, start + count))
    row = torch.zeros(count)
    return Batch(empty, empty, empty, Conditioning({"none": row}), row, row, places, (0,) * count, places)


def spread(name: str, count: int, seed: int, start: int = 0) -> Tensor:
    return TIMESTEPS[name].spread(Keyed(seed), positions(count, start))


def learned(at: Callable[[Tensor], Tensor], observations: int = 4000) -> Importance:
    """What is learned where the squared gradient at number u is `at(u)`, from uniform draws."""
    importance = Importance(torch.device("cpu"))
    even = spread("stratified", observations, 9)
    moved, bins, _ = importance.place(even)
    assert torch.allclose(moved, even)  # before anything is seen, draws stay where they are
    importance.observe(bins, at(moved).float())
    importance.refresh()
    return importance


@pytest.mark.parametrize("timesteps", ["uniform", "stratified", "antithetic"])
def test_times_cover_the_schedule_and_belong_to_the_draw(prepared: Make, timesteps: str) -> None:
    ready = prepared(f"train.timesteps={timesteps}", "train.batch_size=12")
    times = torch.cat([ready.step.noised(batch, Keyed(3))[2][::2] for batch in islice(ready.batches(0), 8)])
    assert times.dtype == torch.float32
    assert len(set(times.tolist())) == 96  # the second epoch draws anew
    counts = torch.histc(times, 4, 0, 1)
    spread = 21 if timesteps == "uniform" else 3  # five standard deviations
    assert (counts - 24).abs().max() <= spread
    later = torch.cat([ready.step.noised(batch, Keyed(3))[2][::2] for batch in islice(ready.batches(48), 4)])
    assert torch.equal(later, times[48:])


def test_logit_normal_times_are_sigmoids_of_normal_numbers(prepared: Make) -> None:
    ready = prepared()
    spread, bend = TIMESTEPS["logit_normal"]
    batch = replace(ready.first_batch(), positions=tuple(range(4001)))
    t = bend(spread(Keyed(0), batch), batch, ready.family).sort().values
    wanted = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(wanted)
    torch.testing.assert_close(t[(wanted * 4000).long()].logit(), normal, rtol=0, atol=5e-3)
    assert float(t.min()) > 0
    assert float(t.max()) < 1


@pytest.mark.parametrize("timesteps", ["uniform", "stratified", "antithetic", "logit_normal", "importance"])
def test_a_range_holds_all_training_times_and_no_validation_times(prepared: Make, timesteps: str) -> None:
    ready = prepared(f"train.timesteps={timesteps}", "train.timestep_range=[0.5, 0.75]", "train.batch_size=12")
    batches = list(islice(ready.batches(0), 4))
    times = torch.cat([ready.step.noised(batch, Keyed(3))[2] for batch in batches])
    assert 0.5 <= times.min() < 0.55
    assert 0.7 < times.max() <= 0.75
    everywhere = torch.cat([ready.step.on_held_out().noised(batch, Keyed(3))[2] for batch in batches])
    assert everywhere.min() < 0.1
    assert everywhere.max() > 0.9


def test_auto_times_are_the_familys(prepared: Make) -> None:
    assert prepared().step.timesteps == prepared("train.timesteps=auto").step.timesteps == "stratified"
    assert prepared("train.timesteps=shifted").step.timesteps == "shifted"


def test_antithetic_times_come_in_mirrored_pairs() -> None:
    even = spread("antithetic", 64, seed=3)
    torch.testing.assert_close(even[::2] + even[1::2], torch.ones(32, dtype=torch.float64))
    assert torch.equal(even[::2], spread("stratified", 32, seed=3))
    assert torch.equal(even[10:20], spread("antithetic", 10, seed=3, start=10))  # of positions, not of batches


@pytest.mark.parametrize("name", ["stratified", "antithetic"])
def test_even_times_give_a_less_noisy_mean_than_independent_ones(name: str) -> None:
    """Of a smooth function over batches of 16, at any place of the run."""
    smooth = [lambda t: t, lambda t: (3 * t).exp(), lambda t: (2 * math.pi * t).sin() + t.square()]
    for function in smooth:
        noise = {
            which: torch.stack([function(spread(which, 16, seed, 16 * seed)).mean() for seed in range(300)]).var()
            for which in ("uniform", name)
        }
        assert noise[name] < noise["uniform"] / 5
    linear = torch.stack([spread(name, 16, seed).mean() for seed in range(300)])
    assert (linear.var() < 1e-30) == (name == "antithetic")  # what is linear cancels altogether


@pytest.mark.parametrize("function", [lambda t: (3 * t).exp(), lambda t: 1 / (0.02 + t), lambda t: (t - 0.6).abs()])
def test_importance_leaves_the_mean_alone_and_lowers_its_variance(function: Callable[[Tensor], Tensor]) -> None:
    """A gradient that is a function of time; independent draws, so that importance alone is what lowers the variance."""
    importance = learned(lambda u: function(u).square())
    even = torch.rand(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved, _, weight = importance.place(even)
    plain, weighed, unweighed = function(even), weight * function(moved), function(moved)
    middles = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    exact, error = function(middles).mean(), 5 * float(weighed.std()) / math.sqrt(400_000)
    assert float((weighed.mean() - exact).abs()) < error
    assert float((unweighed.mean() - exact).abs()) > 10 * error  # or the weights would prove nothing
    assert float(weighed.var()) < 0.6 * float(plain.var())


def test_draws_follow_the_learned_shares_within_the_floor() -> None:
    importance = learned(lambda u: torch.where(u < 0.25, 100.0, 0.01))
    shares = importance.probability
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares.min()) >= FLOOR / BINS
    # 250 observations a bin, and 4 more at the overall mean of 25
    large, small = math.sqrt((250 * 100 + 4 * 25) / 254), math.sqrt((250 * 0.01 + 4 * 25) / 254)
    expected = (1 - FLOOR) * 4 * large / (4 * large + 12 * small) + FLOOR / 4
    assert float(shares[:4].sum()) == pytest.approx(expected, abs=1e-3)
    _, bins, weight = importance.place(spread("stratified", 10_000, 0))
    torch.testing.assert_close(torch.bincount(bins, minlength=BINS) / 10_000, shares, rtol=0, atol=1e-3, check_dtype=False)
    assert float(weight.max()) <= 1 / FLOOR
    moved, _, _ = importance.place(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_shares_are_observed_gradients_times_their_gain() -> None:
    importance = Importance(torch.device("cpu"))
    weights = torch.linspace(1, 4, BINS) ** 2
    importance.learn_gain(torch.stack([weights * 2.0, torch.full((BINS,), 2.0)]))
    expected = torch.linspace(1, 4, BINS, dtype=torch.float64)
    torch.testing.assert_close(importance.gain, expected / 2.5)
    wanted = (1 - FLOOR) * expected / expected.sum() + FLOOR / BINS
    torch.testing.assert_close(importance.probability, wanted)  # until there are observations
    everywhere = torch.arange(BINS).repeat(5000)
    importance.observe(everywhere, (5 - torch.linspace(1, 4, BINS)).square().repeat(5000))
    importance.refresh()
    rising, falling = importance.probability[: BINS // 2], importance.probability[BINS // 2 :]
    torch.testing.assert_close(rising, falling.flip(0), rtol=0.02, atol=0)  # u (5 − u) is symmetric about its top at 2.5
    assert float(rising[-1]) > 1.3 * float(rising[0])
    broken = Importance(torch.device("cpu"))
    broken.learn_gain(torch.zeros(2, BINS))
    assert broken.gain.tolist() == [1.0] * BINS


def test_gains_are_those_of_single_comparisons_at_single_times(prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the gradient in the weights over that in the predictions, here by a backward pass at given times."""
    ready = prepared(LEARNING, "train.batch_size=1")
    importance, parameters = ready.step.importance, list(trained(ready.policy).values())
    assert importance is not None
    few = list(islice(ready.batches(0), 3))
    ready.step.gains(few, parameters, Keyed(0))
    assert not importance.seen.any()
    assert float(importance.gain.std()) > 0.02
    plain, straight, found = replace(ready.step, importance=None), TIMESTEPS["stratified"].bend, []
    for part in (0, 9, 15):
        sizes = torch.zeros(2)
        for batch in few:
            u = TIMESTEPS["stratified"].spread(Keyed(0), batch)
            with monkeypatch.context() as patch:
                patch.setitem(TIMESTEPS, "stratified", Sampler(lambda rng, batch, t=(part + u) / BINS: t, straight))
                terms = plain.terms(batch, Keyed(0))
            loss = ready.step.objective(terms, **ready.step.knobs)
            sizes[1] += squared_gradient(loss, terms).sum()
            loss.sum().backward()
            sizes[0] += sum(parameter.grad.square().sum() for parameter in parameters if parameter.grad is not None)
            ready.optimizer.zero_grad()
        found.append(float((sizes[0] / sizes[1]).sqrt()))
    gain = importance.gain
    assert float(gain[9] / gain[0]) == pytest.approx(found[1] / found[0], rel=1e-3)
    assert float(gain[15] / gain[0]) == pytest.approx(found[2] / found[0], rel=1e-3)


def test_without_gradients_nothing_is_learned() -> None:
    importance = learned(torch.zeros_like)
    assert importance.probability.tolist() == [1 / BINS] * BINS
    Importance(torch.device("cpu")).refresh()  # and nothing seen is no error


def test_old_observations_are_forgotten() -> None:
    importance = learned(lambda u: torch.where(u < 0.5, 4.0, 1.0))
    low = float(importance.probability[:8].sum())
    for _ in range(60):
        moved, bins, _ = importance.place(spread("stratified", 400, 1))
        importance.observe(bins, torch.where(moved < 0.5, 1.0, 4.0))
        importance.refresh()
    assert low > 0.6
    assert float(importance.probability[:8].sum()) == pytest.approx(1 - low, abs=0.01)


@needs("reference", "drift")
def drifting(terms: Terms, *, beta: float) -> Tensor:
    assert terms.drift is not None
    return -logsigmoid(beta * (terms.margin - terms.drift.mean(1)))


@needs()
def alone(terms: Terms, *, beta: float) -> Tensor:
    return beta * terms.policy_error[:, 0] - terms.policy_error[:, 1].square()


@pytest.mark.parametrize("objective", [dpo, drifting, alone])
def test_squared_gradients_are_those_of_autograd_through_the_predictions(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, targets, references = (torch.randn(5, 2, 4, 3, 3, generator=generator) for _ in range(3))
    predictions.requires_grad_()

    def size(residual: Tensor) -> Tensor:
        return residual.square().mean((2, 3, 4))

    needed = objective.needs
    terms = Terms(
        policy_error=size(predictions - targets),
        reference_error=size(references - targets) if needed else None,
        drift=size(predictions - references) if "drift" in needed else None,
        preference=torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0]),
    )
    loss = objective(terms, beta=3.0) * torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0])
    found = squared_gradient(loss, terms)
    assert not found.requires_grad
    (exact,) = torch.autograd.grad(loss.sum(), predictions)  # the graph is still there
    torch.testing.assert_close(found * 4 / predictions[0, 0].numel(), exact.square().sum((1, 2, 3, 4)))


def test_a_loss_is_that_of_the_moved_time_with_the_weight_of_the_move(prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepared(LEARNING, "train.batch_size=6")
    importance = ready.step.importance
    assert importance is not None
    importance.probability.copy_(learned(lambda u: (5 * u).exp()).probability)
    batch, before = ready.first_batch(), importance.seen.clone()
    loss, metrics = ready.step(batch, Keyed(0))
    moved, bins, weight = importance.place(TIMESTEPS["stratified"].spread(Keyed(0), batch))
    assert float((weight - 1).abs().max()) > 0.5
    assert float((moved - TIMESTEPS["stratified"].spread(Keyed(0), batch)).abs().max()) > 0.1

    straight = TIMESTEPS["stratified"].bend
    monkeypatch.setitem(TIMESTEPS, "stratified", Sampler(lambda rng, batch: moved, straight))
    plain, measured = replace(ready.step, importance=None)(batch, Keyed(0))
    torch.testing.assert_close(loss, plain * weight.float())
    assert torch.equal(metrics["loss"], loss.detach())
    torch.testing.assert_close(metrics["rewards/accuracies"], measured["rewards/accuracies"] * weight.float())
    counts = (importance.seen - before)[1]
    assert torch.equal(counts, torch.bincount(bins, minlength=BINS).float())
    assert float((importance.seen - before)[0].sum()) > 0


def test_validation_neither_follows_nor_feeds_what_is_learned(prepared: Make) -> None:
    ready = prepared(LEARNING)
    importance = ready.step.importance
    assert importance is not None
    before = validation(ready.step, ready.held_out, ready.config, ready.accelerator)
    importance.probability.copy_(learned(lambda u: (5 * u).exp()).probability)
    assert validation(ready.step, ready.held_out, ready.config, ready.accelerator) == before
    with torch.no_grad():
        ready.step(ready.first_batch(), Keyed(0))
    assert not importance.seen.any()


def test_importance_with_a_bank_is_refused(prepared: Make) -> None:
    with pytest.raises(ConfigError, match=r"each comparison keeps its own; set reference\.bank=null, or train\.timesteps=auto"):
        prepared(LEARNING, "reference.bank=2")


@pytest.mark.parametrize("timesteps", ["antithetic", "importance"])
def test_a_step_reads_nothing_back(
    prepared: Make, timesteps: str, no_read_back: Callable[[], AbstractContextManager[None]]
) -> None:
    ready = prepared(f"train.timesteps={timesteps}")
    batch = ready.first_batch()
    ready.step(batch, Keyed(0))
    with no_read_back():
        loss, _ = ready.step(batch, Keyed(0))
        loss.mean().backward()
        ready.optimizer.step()


def test_what_was_learned_survives_a_stop_between_two_refreshes(
    settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the second window of three steps: shares of the first and observations of the second are needed."""
    common = (LEARNING, "train.steps=8", "train.log_every=3", "train.accumulation=2", "train.validate_every=8")
    runs.align(settings(tmp_path / "whole", *common), progress=False)
    own, calls = PreferenceStep.__call__, 0

    def stopping(self: PreferenceStep, batch: Batch, rng: Keyed) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 2 * 5:
            os.kill(os.getpid(), signal.SIGINT)
        return own(self, batch, rng)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceStep, "__call__", stopping)
        assert not runs.align(settings(tmp_path / "parts", *common), progress=False)["finished"]
    assert [path.name for path in states(tmp_path / "parts" / "state")] == ["step-00000005"]
    with pytest.raises(CheckpointError, match=r"train\.log_every was 3 and is 4"):
        runs.align(settings(tmp_path / "parts", *common, "train.log_every=4"), resume=True, progress=False)
    assert runs.align(settings(tmp_path / "parts", *common), resume=True, progress=False)["finished"]
    one, other = (load_file(states(tmp_path / name / "state")[-1] / "state.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys() >= {"learned/timesteps/probability", "learned/timesteps/seen", "learned/timesteps/gain"}
    # The stop wrote a line of metrics between two, which the guard's running means take in as two parts of one.
    torch.testing.assert_close(other.pop("learned/guard/memory"), one.pop("learned/guard/memory"), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert float(one["learned/timesteps/gain"].std()) > 0.02
    assert float(one["learned/timesteps/probability"].std()) > 1e-4


def test_what_is_carried_is_logged_as_it_is(prepared: Make) -> None:
    """However often a time is drawn: β is no measurement of comparisons, whose means importance weighs."""
    ready = prepared(LEARNING, "switches.beta=target", "train.batch_size=2")
    importance, adaptive = ready.step.importance, ready.step.adaptive
    assert importance is not None
    assert adaptive is not None
    importance.learn_gain(torch.stack([torch.linspace(1, 50, BINS), torch.ones(BINS)]))
    beta, weights = adaptive.scalars["beta"].clone(), []
    for batch in islice(ready.batches(0), 3):
        _, metrics = ready.step(batch, Keyed(0))
        assert torch.equal(metrics["adaptive/beta"], beta.expand(2))
        weights.append(importance.place(TIMESTEPS["stratified"].spread(Keyed(0), batch))[2])
    assert (torch.cat(weights) - 1).abs().max() > 0.1
