"""Annotators of several kinds: EM as NumPy has it, who is told apart, what is learned, saved, exported and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from flowalign import runs
from flowalign.align.checks import check
from flowalign.align.mixture import Annotators, MixtureStep, Types, posterior
from flowalign.data.pairs import fixed_draws
from flowalign.data.readers import open_comparisons
from flowalign.data.records import key63
from flowalign.device import make_accelerator
from flowalign.errors import ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared, load_objective, prepare
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]
RED, BLUE = tuple(f"red {place}" for place in range(4)), tuple(f"blue {place}" for place in range(4))
TWO = "switches.annotator_types=2"


@pytest.fixture(scope="module")
def tastes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A red and a blue picture of 16 things to train on and of 8 held out; half of eight people prefer red, half blue."""
    folder, rng = tmp_path_factory.mktemp("tastes"), np.random.default_rng(0)
    for place in range(24):
        for name, tint in (("red", (225, 30, 30)), ("blue", (30, 30, 225))):
            pixels = rng.normal(np.array(tint) + rng.normal(0, 25, 3), 8, (32, 32, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{place}-{name}.png")

    def vote(place: int, who: str) -> str:
        better, worse = ("red", "blue") if who in RED else ("blue", "red")
        row = {"prompt": f"{'abcdef'[place % 6]} thing", "annotator": who}
        return json.dumps(row | {"chosen": f"{place}-{better}.png", "rejected": f"{place}-{worse}.png"}) + "\n"

    train = [vote(int(place), who) for who in (*RED, *BLUE) for place in rng.choice(16, 6, replace=False)]
    held = {who: [vote(place, who) for place in range(16, 24)] for who in (RED[0], BLUE[0])}
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "held")}
    paths["train"].write_text("".join(train))
    paths["held"].write_text("".join(held[RED[0]] + held[BLUE[0]]))
    return paths


@dataclass(frozen=True)
class Learned:
    """A finished run, its metrics, and what each policy makes of the held-out pairs."""

    folder: Path
    metrics: list[dict[str, float]]
    right: torch.Tensor
    """`[K, 2]` share of the pairs that each policy orders as those do who prefer red, and as those who prefer blue."""


@pytest.fixture(scope="module")
def learn(
    settings: Callable[..., Config], tastes: dict[str, Path], clear: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Learned]:
    def run(*more: str) -> Learned:
        folder = tmp_path_factory.mktemp("learn") / "run"
        config = settings(
            folder,
            f"model.checkpoint={clear}",
            f"data={{train: {tastes['train']}, validation: {tastes['held']}, resolution: 16}}",
            "objective.beta=100.0",
            "trainable.targets=[conv1, conv2, to_q, to_k, to_v, to_out.0, conv_in, conv_out]",
            "train.steps=24",
            "train.seed=2",
            "train.learning_rate=1e-2",
            "train.batch_size=8",
            "train.caption_dropout=0",
            "train.timestep_range=[0.2, 0.7]",
            *more,
        )
        runs.align(config, progress=False)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return Learned(folder, metrics, orders(config, folder))

    return run


def orders(config: Config, folder: Path) -> torch.Tensor:
    """By plain diffusers and the exported adapters: who has the smaller error, as a mean over eight times and noises."""
    ready = prepare(config, make_accelerator(config, folder), progress=False)
    assert ready.held_out is not None
    step = ready.step.on_held_out()
    found = []
    folders = sorted((folder / "types").iterdir()) if (folder / "types").is_dir() else [folder]
    with torch.no_grad():
        for each in folders:
            pipeline = StableDiffusionPipeline.from_pretrained(config.model.checkpoint, safety_checker=None)
            errors = []
            for adapted in (False, True):
                if adapted:
                    pipeline.load_lora_weights(each / "weights")
                errors.append(0.0)
                for draw in range(8):
                    (batch,) = fixed_draws(ready.held_out, 16, 8, draw)
                    x_t, target, t = step.noised(batch, Keyed(1))
                    found_error = ready.family.predict(pipeline.unet, x_t, t, step.told(batch)) - target
                    errors[-1] += found_error.square().flatten(1).mean(1).view(16, 2)
            h = errors[0] - errors[1]
            found.append((h[:, 0] > h[:, 1]).float().view(2, 8).mean(1))
    return torch.stack(found)


@pytest.fixture(scope="module")
def mixture(learn: Callable[..., Learned]) -> Learned:
    return learn(TWO, "switches.annotator_first=12")


def test_annotators_of_opposite_tastes_are_told_apart(mixture: Learned) -> None:
    table = json.loads((mixture.folder / "annotators.json").read_text())
    assert set(table) == {*RED, *BLUE}
    guess = {who: int(np.argmax(gamma)) for who, gamma in table.items()}
    assert len({guess[who] for who in RED}) == len({guess[who] for who in BLUE}) == 1  # purity 1
    assert guess[RED[0]] != guess[BLUE[0]]
    assert np.mean([max(gamma) for gamma in table.values()]) >= 0.9
    last = mixture.metrics[-1]
    assert last["eval/types/share_0"] == pytest.approx(0.5, abs=0.1)
    assert last["eval/types/share_0"] + last["eval/types/share_1"] == pytest.approx(1.0)


def test_each_policy_follows_its_kind(mixture: Learned) -> None:
    table = json.loads((mixture.folder / "annotators.json").read_text())
    reds = int(np.argmax(table[RED[0]]))
    assert mixture.right[reds].tolist() == pytest.approx([1.0, 0.0], abs=0.13)  # one of eight
    assert mixture.right[1 - reds].tolist() == pytest.approx([0.0, 1.0], abs=0.13)
    assert mixture.metrics[-1]["eval/rewards/accuracies"] >= 0.8  # at single times and noises


@pytest.mark.slow
def test_one_policy_for_all_follows_nobody(learn: Callable[..., Learned]) -> None:
    one = learn()
    assert one.right.mean().item() == pytest.approx(0.5, abs=0.15)  # what is right for one kind is wrong for the other
    assert one.right.min().item() <= 0.5
    assert one.metrics[-1]["eval/rewards/accuracies"] == pytest.approx(0.5, abs=0.15)


def test_each_type_is_a_run_folder_of_its_own(mixture: Learned, tmp_path: Path) -> None:
    first, second = (
        load_file(mixture.folder / "types" / each / "weights" / "pytorch_lora_weights.safetensors") for each in "01"
    )
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    for each in "01":
        found = runs.generate(str(mixture.folder / "types" / each), ["a thing"], out=tmp_path / each, steps=1, progress=False)
        assert found["summary"]
    assert not (mixture.folder / "weights").exists()
    assert (mixture.folder / "report.html").is_file()


def test_the_posterior_is_bayes_rule() -> None:
    rng = np.random.default_rng(0)
    said, share = rng.normal(-20, 5, (7, 3)), rng.dirichlet([1, 1, 1])
    joint = share * np.exp(said)
    expected = joint / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(posterior(torch.tensor(said), torch.tensor(share)).numpy(), expected, rtol=1e-9)
    far = posterior(torch.tensor([[-1e6, -1e6 - 1, -3e6]]), torch.tensor([0.5, 0.5, 0.0]))
    assert far[0].tolist() == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0.0], abs=1e-6)


def people(who: list[int], weight: list[float] | None = None) -> Any:
    """As much of a Cached as says who judged what."""
    weights = np.ones(len(who), np.float32) if weight is None else np.array(weight, np.float32)
    names = tuple(f"p{place}" for place in range(max(who) + 1))
    return SimpleNamespace(annotators=names, annotator=np.array(who), weight=weights)


def batch_of(cached: Any, places: list[int]) -> Any:
    return SimpleNamespace(annotators=tuple(key63(cached.annotators[cached.annotator[place]]) for place in places))


def test_em_on_a_table_never_falls_and_finds_the_types() -> None:
    """Six items, two types with worths of their own, 30 people with 25 votes each; the M-step is a logistic regression."""
    rng = np.random.default_rng(1)
    worth, kind = rng.normal(0, 1.5, (2, 6)), np.repeat([0, 1], 15)
    who = np.repeat(np.arange(30), 25)
    pair = np.array([rng.choice(6, 2, replace=False) for _ in who])
    ahead = worth[kind[who], pair[:, 0]] - worth[kind[who], pair[:, 1]]
    pair = np.where((rng.random(len(who)) < expit(ahead))[:, None], pair, pair[:, ::-1])  # winner first
    cached = people(who.tolist())
    table = Annotators(cached, 2, seed=3, every=1, first=0, device=torch.device("cpu"))
    rows = table.rows(batch_of(cached, list(range(len(who)))))
    likelihoods, fitted = [], np.zeros((2, 6))
    for step in range(1, 13):
        gamma = table.gamma.double().numpy()
        share = gamma[:-1].mean(0)
        np.testing.assert_allclose(gamma[-1], share, atol=1e-6)
        for k in range(2):
            weight = gamma[who, k]

            def loss(theta: Any, weight: Any = weight) -> Any:
                return -(weight * np.log(expit(theta[pair[:, 0]] - theta[pair[:, 1]]))).sum()

            fitted[k] = minimize(loss, fitted[k], method="BFGS", options={"gtol": 1e-6}).x
        said = np.log(expit(fitted[:, pair[:, 0]] - fitted[:, pair[:, 1]])).T
        sums = np.stack([np.bincount(who, said[:, k]) for k in range(2)], 1)
        likelihoods.append(logsumexp(np.log(share) + sums, axis=1).sum())
        table.observe(rows, torch.from_numpy(said).float(), torch.ones(len(who)))
        table.after(step)
        joint = share * np.exp(sums - sums.max(1, keepdims=True))
        np.testing.assert_allclose(table.gamma[:-1].numpy(), joint / joint.sum(1, keepdims=True), atol=2e-3)
    assert np.diff(likelihoods).min() >= -1e-3
    assert likelihoods[-1] > likelihoods[0] + 30
    guess = table.gamma[:-1].argmax(1).numpy()
    assert max((guess == kind).mean(), (guess != kind).mean()) >= 0.9


def test_sums_over_some_comparisons_count_as_over_all_of_them() -> None:
    cached = people([0, 0, 0, 1, 2], weight=[1.0, 2.0, 1.0, 1.0, 1.0])
    table = Annotators(cached, 2, seed=0, every=2, first=2, device=torch.device("cpu"))
    start, share = table.gamma[:-1].clone(), table.share.clone()
    said = torch.tensor([[-1.0, -2.0], [-0.5, -3.0], [-2.0, -0.1]])
    table.observe(table.rows(batch_of(cached, [0, 1, 3])), said, torch.tensor([1.0, 2.0, 1.0]))
    table.after(1)
    assert torch.equal(table.gamma[:-1], start)  # not due yet
    table.after(2)
    joint = share.double() * torch.exp(4 / 3 * (said[0] + 2 * said[1]).double())  # weights of 3 of 4
    torch.testing.assert_close(table.gamma[0].double(), joint / joint.sum(), rtol=1e-4, atol=1e-5)
    assert torch.equal(table.gamma[2], start[2])  # was not asked
    torch.testing.assert_close(table.share, table.gamma[:-1].mean(0))
    assert not table.tensors()["annotators/sums"].any()


def test_nobody_is_guessed_before_the_first_step_of_guessing() -> None:
    cached = people([0, 1])
    table = Annotators(cached, 2, seed=0, every=2, first=4, device=torch.device("cpu"))
    start = table.gamma.clone()
    for step in (1, 2, 3, 4):
        table.observe(table.rows(batch_of(cached, [0])), torch.tensor([[-1.0, -1.0 - step]]), torch.ones(1))
        table.after(step)
        assert torch.equal(table.gamma, start) == (step < 4)
    odds = table.gamma[0, 0] / table.gamma[0, 1] / (start[-1, 0] / start[-1, 1])
    assert odds.item() == pytest.approx(np.exp(3.5), rel=1e-3)  # of steps 3 and 4 alone, twice seen and counted once


def test_the_start_depends_on_seed_and_name_alone() -> None:
    one, other = (Annotators(people(who), 3, 5, 1, 0, torch.device("cpu")) for who in ([0, 1, 1, 2], [2, 1, 0, 0, 0]))
    assert torch.equal(one.gamma, other.gamma)
    torch.testing.assert_close(one.gamma.sum(1), torch.ones(4))
    assert not torch.equal(one.gamma, Annotators(people([0, 1, 2]), 3, 6, 1, 0, torch.device("cpu")).gamma)
    many = Annotators(people(list(range(4000))), 2, 0, 1, 0, torch.device("cpu")).gamma[:-1, 0]
    assert many.mean().item() == pytest.approx(0.5, abs=0.02)
    assert many.std().item() == pytest.approx(12**-0.5, abs=0.02)  # even on [0, 1]


def test_the_loss_is_that_of_each_policy_weighed_by_responsibility(prepared: Make, tastes: dict[str, Path]) -> None:
    data = (f"data.train={tastes['train']}", f"data.validation={tastes['held']}")
    ready = prepared(TWO, *data, "reference.bank=1", "train.batch_size=3")
    step = ready.full_step
    assert isinstance(step, MixtureStep)
    assert isinstance(ready.policy, Types)
    assert ready.annotators is not None
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    live = prepared(*data, "train.batch_size=3")
    batch = ready.first_batch()
    x_t, target, t = live.step.noised(batch, Keyed(0))
    told = live.step.told(batch)
    with torch.no_grad():
        base, first, second = (
            (live.family.predict(each, x_t, t, told) - target).square().flatten(1).mean(1).view(3, 2)
            for each in (live.family.denoiser, *ready.policy.policies)
        )
    margins = [500 * 0.5 * ((base - each)[:, 0] - (base - each)[:, 1]) for each in (first, second)]
    rows = [ready.annotators.names.index(ready.train.cached.annotators[who]) for who in places(ready, batch)]
    gamma = ready.annotators.gamma[rows]
    expected = sum(gamma[:, k] * torch.nn.functional.softplus(-margins[k]) for k in range(2))
    loss, metrics = step(batch, Keyed(0))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=1e-4)
    mixed = gamma[:, 0] * margins[0] + gamma[:, 1] * margins[1]
    torch.testing.assert_close(metrics["rewards/margins"], mixed, rtol=1e-2, atol=1e-3)
    fresh = ready.annotators._fresh[rows]
    assert (fresh[:, 2] >= 1).all()
    loss.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained(ready.policy).values())


def places(ready: Prepared, batch: Any) -> list[int]:
    """The annotator of each comparison of a batch, by its place in the names."""
    known = [key63(name) for name in ready.train.cached.annotators]
    return [known.index(each) for each in batch.annotators]


def test_policies_share_all_but_their_adapters(prepared: Make, tastes: dict[str, Path]) -> None:
    ready = prepared("switches.annotator_types=3", f"data.train={tastes['train']}", f"data.validation={tastes['held']}")
    assert isinstance(ready.policy, Types)
    frozen = [
        {name: p.data_ptr() for name, p in each.named_parameters() if not p.requires_grad} for each in ready.policy.policies
    ]
    assert frozen[0] == frozen[1] == frozen[2]
    downs = [{n: p for n, p in each.named_parameters() if "lora_A" in n} for each in ready.policy.policies]
    assert not any(torch.equal(downs[0][name], downs[1][name]) for name in downs[0])
    assert ready.at_start.self_test(ready.first_batch(), Keyed(0)) == 0.0


def test_a_stopped_run_goes_on_as_if_it_never_had(
    settings: Callable[..., Config], tastes: dict[str, Path], tmp_path: Path
) -> None:
    common = (
        TWO,
        f"data.train={tastes['train']}",
        f"data.validation={tastes['held']}",
        "switches.annotator_every=3",
        "switches.annotator_first=0",
    )
    small = ("train.save_every=2", "train.validate_every=2", "train.learning_rate=1e-2")  # a run validates at its end too
    runs.align(settings(tmp_path / "whole", *common, *small, "train.steps=6"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, *small, "train.steps=4"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, *small, "train.steps=6"), resume=True, progress=False)
    whole, parts = (
        load_file(sorted((tmp_path / each / "state").iterdir())[-1] / "state.safetensors") for each in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert {"learned/annotators/gamma", "learned/annotators/sums"} <= whole.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    tables = [json.loads((tmp_path / each / "annotators.json").read_text()) for each in ("whole", "parts")]
    assert tables[0] == tables[1]


def test_a_step_of_several_policies_reads_nothing_back(
    prepared: Make, tastes: dict[str, Path], no_read_back: Callable[[], Any]
) -> None:
    ready = prepared(TWO, f"data.train={tastes['train']}", f"data.validation={tastes['held']}", "switches.annotator_first=0")
    assert ready.annotators is not None
    batch = ready.first_batch()
    rng = Keyed(0)
    ready.full_step(batch, rng)[0].mean().backward()
    with no_read_back():
        ready.annotators.after(12)  # rounds are of 24 steps
        ready.annotators.after(24)


def test_the_annotator_is_read_by_every_convention(votes: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row | {"user_id": n % 3}) + "\n" for n, row in enumerate(rows)))
    found = open_comparisons(tmp_path / "named.jsonl", columns={"annotator": "user_id"})
    assert [comparison.annotator for comparison in islice(found, 4)] == ["0", "1", "2", "0"]
    labels = [
        {"prompt": "a", "jpg_0": "x.png", "jpg_1": "y.png", "label_0": 0, "label_1": 1, "annotator": who} for who in ("k", "")
    ]
    (tmp_path / "picks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    assert [comparison.annotator for comparison in open_comparisons(tmp_path / "picks.jsonl")] == ["k", None]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("objective={name: beta_dpo}", "objective.name 'beta_dpo' carries averages over all policies at once"),
        ("objective={name: simpo}", "with objective.name 'simpo' and these data there is no β, no reference or no pair"),
        ("objective={name: ipo}", "with objective.name 'ipo' and these data"),
        ("trainable.kind=full", "trainable.kind 'full' has no adapters to be a policy of each type"),
        ("reference.kind=ema", "reference.kind 'ema' follows one policy"),
        ("train.timesteps=importance", "'importance' learns from the gradients of one policy"),
        ("train.compile=true", "train.compile compiles one policy"),
        ("train.backward=chunked", "train.backward 'chunked' divides the pictures of one policy"),
        ("switches.beta=target", "switches.beta 'target' moves β by the margins of all at once"),
        ("train.seed=1", "must know who judged, and 2 of the 3 comparisons do not say; give every row an annotator"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: Callable[..., Config], tmp_path: Path, override: str, what: str
) -> None:
    config = settings(tmp_path, TWO, override)
    objective, knobs = load_objective(config)
    who = {"annotators": ("somebody", ""), "annotator": np.array([1, 0, 1])}
    family: Any = None  # which these rules do not look at
    train: Any = Three(**who, pictures=np.zeros((3, 2, 32)), num_chosen=1)
    with pytest.raises(ConfigError, match=f"switches.annotator_types 2.*{what}"):
        check(config, family, objective, knobs, train)


class Three(SimpleNamespace):
    """As much of a Cached of three comparisons as a check reads."""

    def __len__(self) -> int:
        return 3


def test_the_plan_counts_every_policy_and_one_reference(
    settings: Callable[..., Config], tastes: dict[str, Path], tmp_path: Path
) -> None:
    one, three = (
        runs.plan(settings(tmp_path, f"data.train={tastes['train']}", f"switches.annotator_types={count}")) for count in (1, 3)
    )
    flops = [found["flops_per_comparison"] for found in (one, three)]
    for name in ("policy_forward", "policy_backward"):
        assert flops[1][name] == 3 * flops[0][name]
    assert flops[1]["reference"] == flops[0]["reference"]
    assert three["parameters"]["trained"] == 3 * one["parameters"]["trained"]
    parts = [{part["name"]: part["bytes"] for part in found["memory"]["parts"]} for found in (one, three)]
    assert parts[1]["frozen weights"] == parts[0]["frozen weights"]
    assert parts[1]["activations"] > 2.5 * parts[0]["activations"]
