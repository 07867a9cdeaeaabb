"""What combines with any objective: each switch against its formula, its effect on gradients, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign import runs
from flowalign.align.switches import safeguarded, time_weight
from flowalign.errors import ConfigError
from flowalign.families.base import Level
from flowalign.rng import Keyed
from flowalign.settings import Config, Switches
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]


def gradient(loss: Tensor, ready: Prepared) -> Tensor:
    found = torch.autograd.grad(loss.sum(), list(trained(ready.policy).values()))
    return torch.cat([each.flatten() for each in found])


def shake(ready: Prepared, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def residuals(seed: int, count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, count, 12, generator=generator, dtype=torch.float64)
    made[1, ::2] += 1.5 * made[0, ::2]  # half of the pairs pull together
    return made[0].requires_grad_(), made[1].requires_grad_()


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9])
def test_safeguard_does_not_raise_the_chosen_error_to_first_order(mu: float) -> None:
    chosen, rejected = residuals(0)
    error = torch.stack([chosen.square().mean(1), rejected.square().mean(1)], dim=1)
    dot = (chosen * rejected).mean(1)
    kept = safeguarded(error, dot.detach(), mu)
    torch.testing.assert_close(kept, error)
    g_w, g_l = torch.autograd.grad((kept[:, 0] - kept[:, 1]).sum(), (chosen, rejected))
    # The first-order change of e_w along the descent direction of e_w − e_l, both gradients acting on one prediction.
    change = -(g_w * (g_w + g_l)).sum(1)
    plain = -(g_w * (g_w - 2 * rejected.detach() / 12)).sum(1)
    assert (plain > 0).any()
    assert (change <= -mu * g_w.square().sum(1) + 1e-12)[dot > 0].all()


def test_safeguard_is_its_formula_and_leaves_opposing_gradients_alone() -> None:
    error = torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.5, 0.9]], requires_grad=True)
    dot = torch.tensor([0.4, -0.4, 0.02])
    safeguarded(error, dot, 0.6)[:, 1].sum().backward()
    assert error.grad is not None
    assert error.grad[:, 1].tolist() == pytest.approx([0.4 * 0.5 / 0.4, 1.0, 1.0])
    assert error.grad[:, 0].tolist() == [0, 0, 0]


def test_safeguard_of_a_pair_does_not_depend_on_its_neighbours() -> None:
    chosen, rejected = residuals(1, 8)
    error = torch.stack([chosen.square().mean(1), rejected.square().mean(1)], dim=1).detach().requires_grad_()
    dot = (chosen * rejected).mean(1).detach()
    (together,) = torch.autograd.grad(safeguarded(error, dot, 0.9)[:, 1].sum(), error)
    alone = [torch.autograd.grad(safeguarded(error[i : i + 1], dot[i : i + 1], 0.9)[:, 1].sum(), error)[0][i] for i in range(8)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_safeguarded_step_keeps_losses_and_changes_gradients(prepared: Make) -> None:
    plain, safe = prepared(), prepared("switches.safeguard=0.9")
    found = []
    for ready in (plain, safe):
        shake(ready)
        loss, metrics = ready.step(ready.first_batch(), Keyed(0))
        found.append((loss, metrics["error/chosen"], gradient(loss, ready)))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert not torch.allclose(found[0][2], found[1][2])


def test_winner_nll_adds_the_chosen_error(prepared: Make) -> None:
    plain, mixed = prepared(), prepared("switches.winner_nll=2.5")
    batch = plain.first_batch()
    terms = plain.step.terms(batch, Keyed(0))
    torch.testing.assert_close(mixed.step.loss(terms), plain.step.loss(terms) + 2.5 * terms.policy_error[:, 0])
    assert mixed.step.self_test(batch, Keyed(0)) == 0.0


def scored(votes: Path, folder: Path, gaps: list[float]) -> Path:
    """The votes, with scores of which the chosen's is higher by these gaps, taken in turn."""
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    lines = [
        json.dumps(
            row
            | {side: str(votes.parent / row[side]) for side in ("chosen", "rejected")}
            | {"scores": {"taste": [1 + gaps[place % len(gaps)], 1.0]}}
        )
        for place, row in enumerate(rows)
    ]
    path = folder / "scored.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("objective", ["dpo", "ipo", "dpo_and_nll"])
def test_pair_scale_multiplies_the_margin_by_what_the_scores_say(
    prepared: Make, votes: Path, tmp_path: Path, objective: str
) -> None:
    gaps = [(place - 6) / 4 for place in range(12)]
    path = scored(votes, tmp_path, gaps)
    named = "ipo, tau: 0.5" if objective == "ipo" else "dpo, beta: 30.0"
    more = (f"objective={{name: {named}}}", f"data.train={path}", f"data.validation={path}", "train.batch_size=4")
    if objective == "dpo_and_nll":
        more = (*more, "switches.winner_nll=0.5")
    plain, scaled = prepared(*more), prepared(*more, "switches.pair_scale=gap")
    shake(plain)
    shake(scaled)
    batch = scaled.first_batch()
    terms, same = scaled.step.terms(batch, Keyed(0)), plain.step.terms(batch, Keyed(0))
    torch.testing.assert_close(terms.margin, same.margin)  # what is reported is not scaled
    assert terms.scores is not None
    factor = torch.tensor(
        [max(0.0, 2 / (1 + math.exp(-gap)) - 1) for gap in (terms.scores[:, 0] - terms.scores[:, 1]).tolist()]
    )
    assert factor.min() == 0 < factor.max()
    margin = factor * same.margin
    wanted = (margin - 1 / (2 * 0.5)) ** 2 if objective == "ipo" else -torch.nn.functional.logsigmoid(30.0 * margin)
    if objective == "dpo_and_nll":
        wanted = wanted + 0.5 * same.policy_error[:, 0]
    torch.testing.assert_close(scaled.step.loss(terms), wanted)


def test_pair_scale_needs_scores_and_pairs(prepared: Make) -> None:
    with pytest.raises(ConfigError, match=r"switches.pair_scale 'gap' reads scores, and \d+ comparisons have none"):
        prepared("switches.pair_scale=gap")


LEVEL = Level(torch.tensor([-30.0, -1.0, 0.0, 3.0]), torch.tensor([1.0, 0.7, 0.5, 0.1]))


def test_time_weights_are_their_formulas() -> None:
    snr = [math.exp(x) for x in (-30.0, -1.0, 0.0, 3.0)]
    wanted = [min(each, 5.0) * to_x0 for each, to_x0 in zip(snr, (1.0, 0.7, 0.5, 0.1), strict=True)]
    assert time_weight(LEVEL, Switches(time_weight="min_snr")).tolist() == pytest.approx(wanted)
    wanted = [1 / (1 + math.exp(x - 1.5)) for x in (-30.0, -1.0, 0.0, 3.0)]
    assert time_weight(LEVEL, Switches(time_weight="sigmoid", sigmoid_bias=1.5)).tolist() == pytest.approx(wanted)
    assert time_weight(LEVEL, Switches()).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["epsilon", "v_zero_snr", "sample"])
def test_level_turns_an_error_of_the_prediction_into_one_of_x0(prepared: Make, folders: dict[str, Path], kind: str) -> None:
    """By hand: x0 solved from x_t and a prediction that is off by a known amount."""
    ready = prepared(f"model.checkpoint={folders[kind]}")
    family, t = ready.family, torch.tensor([0.05, 0.4, 0.8], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, noise, off = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    x_t, target = family.noisy(x0, noise, t)
    level = family.level(t)
    signal = (level.log_snr.exp() / (1 + level.log_snr.exp())).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, signal.sqrt() * x0 + (1 - signal).sqrt() * noise, rtol=1e-4, atol=1e-4)

    def solved(prediction: Tensor) -> Tensor:
        if kind == "epsilon":
            return (x_t - (1 - signal).sqrt() * prediction) / signal.sqrt()
        return signal.sqrt() * x_t - (1 - signal).sqrt() * prediction if kind == "v_zero_snr" else prediction

    error = (solved(target + off) - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(error, level.to_x0 * off.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_a_weighted_step_is_the_plain_one_times_its_weights(prepared: Make) -> None:
    plain, weighted = prepared(), prepared("switches.time_weight=sigmoid")
    batch = plain.first_batch()
    factor = weighted.family.level(weighted.step.times(batch, Keyed(0)))
    wanted = plain.step(batch, Keyed(0))[0] * torch.sigmoid(-factor.log_snr)
    torch.testing.assert_close(weighted.step(batch, Keyed(0))[0], wanted)
    assert wanted.unique().numel() == len(wanted)


def test_independent_noise_is_a_picture_s_own_and_shared_noise_is_not(prepared: Make) -> None:
    for kind, same in (("shared", True), ("independent", False)):
        ready = prepared(f"switches.noise={kind}", f"model.checkpoint={ready_epsilon(prepared)}")
        _, target, _ = ready.step.noised(ready.first_batch(), Keyed(0))
        chosen, rejected = target.view(2, 2, *target.shape[1:]).unbind(1)  # of an ε-model the target is the noise
        assert torch.equal(chosen, rejected) is same


def ready_epsilon(prepared: Make) -> str:
    return prepared().config.model.checkpoint


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_reference_that_follows_is_the_recurrence_by_hand(prepared: Make, trainable: str) -> None:
    for setting, wanted in (
        (("reference.kind=ema", "reference.decay=0.9"), lambda step, old, new: 0.9 * old + 0.1 * new),
        (("reference.kind=refresh", "reference.every=2"), lambda step, old, new: new if step % 2 == 0 else old),
        (
            ("reference.kind=refresh", "reference.every=2", "reference.mix=0.5"),
            lambda step, old, new: (old + new) / 2 if step % 2 == 0 else old,
        ),
    ):
        ready = prepared(f"trainable.kind={trainable}", *setting)
        assert ready.following is not None
        assert ready.step.self_test(ready.first_batch(), Keyed(0)) == 0.0
        names = list(trained(ready.policy))
        hand = {name: parameter.detach().clone() for name, parameter in trained(ready.policy).items()}
        for step, batch in enumerate(islice(ready.batches(0), 3), start=1):
            ready.step(batch, Keyed(0))[0].mean().backward()
            ready.optimizer.step()
            ready.optimizer.zero_grad()
            ready.following.after(step)
            hand = {name: wanted(step, hand[name], p.detach().clone()) for name, p in trained(ready.policy).items()}
        found = dict(ready.step.reference.named_parameters())
        for name in names:
            torch.testing.assert_close(found[name], hand[name])
            assert not found[name].requires_grad
        frozen = {id(p) for p in ready.policy.parameters() if not p.requires_grad}
        shared = {id(p) for name, p in found.items() if name not in names}
        assert shared == frozen  # of a LoRA, nothing but the adapters is held twice


@pytest.mark.parametrize("setting", ["reference.kind=ema", "reference.kind=refresh"])
def test_a_stopped_run_goes_on_with_the_reference_it_had(settings: Callable[..., Config], tmp_path: Path, setting: str) -> None:
    common = (setting, "reference.every=2", "reference.decay=0.8", "train.save_every=3", "sample.count=1")
    runs.align(settings(tmp_path / "whole", *common, "train.steps=5"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=3"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=5"), resume=True, progress=False)
    whole, parts = ((tmp_path / name / "weights/pytorch_lora_weights.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("settings_of", "said"),
    [
        (("reference.kind=ema", "reference.bank=2"), "reference.kind 'ema' moves; set reference.bank=null"),
        (("reference.kind=adapters_off", "trainable.kind=full"), "allowed: auto, copy, ema, refresh"),
        (("switches.safeguard=1.5",), "switches.safeguard cannot be 1.5"),
        (("switches.time_weight=snr",), "switches.time_weight cannot be 'snr'"),
    ],
)
def test_what_does_not_go_together_is_refused(prepared: Make, settings_of: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(*settings_of)


def test_switches_read_nothing_back(prepared: Make, no_read_back: Any) -> None:
    ready = prepared("switches.safeguard=0.9", "switches.winner_nll=0.1", "switches.time_weight=min_snr", "reference.kind=ema")
    batch = ready.first_batch()
    with no_read_back():
        ready.step(batch, Keyed(0))[0].mean().backward()
        assert ready.following is not None
        ready.following.after(1)
