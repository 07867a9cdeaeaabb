"""A policy that is told weights of objectives: how they travel, who is told, what is learned, saved, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
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

import flowalign
from flowalign import runs
from flowalign.align.checks import check
from flowalign.align.steer import Steered, elsewhere, even_and_corners
from flowalign.data.pairs import PairStream, fixed_draws
from flowalign.data.weights import WEIGHTS
from flowalign.device import make_accelerator
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.base import CONTEXT
from flowalign.families.sampling import SamplerSettings, sample
from flowalign.families.steer import STEER, steering_of
from flowalign.rng import Keyed, key
from flowalign.settings import Config
from flowalign.setup import Prepared, load_objective, prepare
from flowalign.train.trainable import trained
from tests.report.test_card import drawn_by_the_card

Make = Callable[..., Prepared]
STEER_BY = "steer={objectives: [red, blue], hidden: 16}"
IN_WORDS = "steer={objectives: [red, blue], form: prompt}"


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A red and a blue picture of 16 things to train on and 8 held out; the colour with the larger weight is preferred."""
    folder, rng = tmp_path_factory.mktemp("weighed"), np.random.default_rng(0)
    lines: dict[str, list[str]] = {"train": [], "held": []}
    for place in range(24):
        for name, tint in (("red", (225, 30, 30)), ("blue", (30, 30, 225))):
            pixels = rng.normal(np.array(tint) + rng.normal(0, 25, 3), 8, (32, 32, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{place}-{name}.png")
        for red in rng.dirichlet([0.5, 0.5], 3)[:, 0] if place < 16 else (0.0, 1.0):
            better, worse = ("red", "blue") if red > 0.5 else ("blue", "red")
            row = {
                "prompt": f"{'abcdef'[place % 6]} thing",
                "chosen": f"{place}-{better}.png",
                "rejected": f"{place}-{worse}.png",
            }
            row["objective_weights"] = {"red": red, "blue": 1 - red}
            lines["train" if place < 16 else "held"].append(json.dumps(row) + "\n")
    paths = {name: folder / f"{name}.jsonl" for name in lines}
    for name, path in paths.items():
        path.write_text("".join(lines[name]))
    return paths


@pytest.fixture
def data(weighed: dict[str, Path]) -> tuple[str, ...]:
    return f"data.train={weighed['train']}", f"data.validation={weighed['held']}"


def settled(policy: torch.nn.Module) -> None:
    """Change what learns a little, as training would."""
    with torch.no_grad():
        for name, parameter in trained(policy).items():
            noise = torch.Generator().manual_seed(key(0, name) % 2**31)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))


# ------------------------------------------------------------------------------------------------ told
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_at_the_start_policy_and_reference_agree_to_the_last_bit(prepared: Make, data: Any, trainable: str) -> None:
    ready = prepared(STEER_BY, *data, f"trainable.kind={trainable}")
    assert isinstance(ready.policy, Steered)
    with torch.no_grad():
        terms = ready.step.terms(ready.first_batch(), Keyed(0))
    assert terms.reference_error is not None
    assert torch.equal(terms.policy_error, terms.reference_error)
    assert ready.at_start.self_test(ready.first_batch(), Keyed(0)) == 0.0


def test_the_policy_is_told_the_weights_and_the_reference_is_not(prepared: Make, data: Any) -> None:
    ready = prepared(STEER_BY, *data, "train.batch_size=3", "steer.dropout=0", "train.caption_dropout=0")
    assert isinstance(ready.policy, Steered)
    settled(ready.policy)
    batch, rng = ready.first_batch(), Keyed(0)
    assert batch.objective_weights is not None
    x_t, target, t = ready.step.noised(batch, rng)
    told = ready.step.told(batch)
    assert WEIGHTS not in told.tensors
    weights = batch.objective_weights.repeat_interleave(2, 0)  # both pictures of a comparison
    shifted = told.joined(CONTEXT, ready.policy.shift(told.tensors[CONTEXT], weights))
    with torch.no_grad():
        expected = ready.family.predict(ready.policy.denoiser, x_t, t, shifted)
        base = ready.family.predict(ready.family.denoiser, x_t, t, told)
        terms = ready.step.terms(batch, rng)
    assert terms.reference_error is not None
    errors = [(each - target).square().flatten(1).mean(1).view(3, 2) for each in (expected, base)]
    torch.testing.assert_close(terms.policy_error, errors[0])
    torch.testing.assert_close(terms.reference_error, errors[1])


def test_weights_in_words_are_what_the_policy_reads(prepared: Make, data: Any) -> None:
    ready = prepared(IN_WORDS, *data, "train.batch_size=3", "steer.dropout=0", "train.caption_dropout=0")
    batch = ready.first_batch()
    assert batch.policy_conditioning is not None
    assert batch.objective_weights is not None
    place = {int(each): place for place, each in enumerate(ready.train.cached.ids)}
    prompts = [ready.train.cached.prompts[ready.train.cached.prompt[place[each]]] for each in batch.ids]
    said = [f"red {w[0]:.1f} blue {w[1]:.1f}: {p}" for p, w in zip(prompts, batch.objective_weights.tolist(), strict=True)]
    for texts, conditioning in ((prompts, batch.conditioning), (said, batch.policy_conditioning)):
        expected = ready.family.encode_prompts(texts).tensors[CONTEXT]
        torch.testing.assert_close(conditioning.tensors[CONTEXT], expected)
    assert ready.at_start.self_test(batch, Keyed(0)) == 0.0  # held against what both are told
    terms = ready.step.terms(batch, Keyed(0))
    assert not torch.equal(terms.policy_error, terms.reference_error)
    assert len(ready.train.cached.prompts) > 6
    assert [ready.train.cached.prompts[n] for n in range(6)] == [f"{letter} thing" for letter in "abcdef"]


def test_gradients_reach_the_network_and_the_adapters(prepared: Make, data: Any) -> None:
    ready = prepared(STEER_BY, *data)
    names = {name: parameter for name, parameter in trained(ready.policy).items() if "shift" in name}
    batch = ready.first_batch()
    for _ in range(2):
        ready.optimizer.zero_grad()
        ready.step(batch, Keyed(0))[0].mean().backward()
        ready.optimizer.step()
    assert len(names) == 6
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in names.values())
    assert any(parameter.grad.abs().max() > 0 for name, parameter in trained(ready.policy).items() if "lora_B" in name)


def test_the_contrast_is_its_formula_and_the_reference_cancels(prepared: Make, data: Any) -> None:
    """−log σ(β_w (h(y⁺|w⁺) − sg h(y⁺|w⁻))), written out with a forward under each of the two weights."""
    common = (STEER_BY, *data, "train.batch_size=6", "steer.dropout=0.5", "train.caption_dropout=0")
    plain, ready = prepared(*common), prepared(*common, "steer.contrast=30")
    assert isinstance(ready.policy, Steered)
    settled(plain.policy)
    settled(ready.policy)
    batch, rng = ready.first_batch(), Keyed(0)
    assert batch.objective_weights is not None
    told = batch.objective_weights.any(1)
    assert told.any()
    assert not told.all()
    other, again = elsewhere(batch, rng)
    assert torch.equal(again, told)
    torch.testing.assert_close(other.sum(1), told.float())
    assert not torch.isclose(other[told], batch.objective_weights[told]).all(1).any()
    x_t, target, t = ready.step.noised(batch, rng)
    conditioning, chosen = ready.step.told(batch), slice(0, None, 2)
    errors = []
    for weights in (batch.objective_weights, other):
        given = conditioning.joined(WEIGHTS, weights.repeat_interleave(2, 0))
        found = ready.policy(ready.family, x_t, t, given)
        errors.append((found - target).square().flatten(1).mean(1)[chosen])
    terms = ready.step.terms(batch, rng)
    reference = terms.given("reference")[:, 0]
    own, elsewhere_ = (0.5 * (reference - error) for error in errors)
    expected = torch.where(told, -torch.log(torch.sigmoid(30 * (own - elsewhere_.detach()))), 0.0)
    loss, before = ready.step.loss(terms), plain.step.loss(plain.step.terms(batch, rng))
    torch.testing.assert_close(loss - before, expected, rtol=1e-3, atol=1e-5)
    assert float(expected.detach()[told].min()) > 0
    # Where weights are told the gradient lowers the error under them, and nothing pulls on the other forward.
    without = ready.step.loss(replace(terms, other_error=None))
    (pull,) = torch.autograd.grad((loss - without).sum(), terms.policy_error)
    assert (pull[told, 0] > 0).all()
    assert not pull[~told].any()
    assert not pull[:, 1].any()


def items(ready: Prepared, count: int, **more: float) -> list[Any]:
    stream = PairStream(ready.train, 5, batch_size=8, **more)
    return [item for group in islice(stream._items(), count // 8) for item in group]


def test_weights_are_dropped_as_often_as_asked_and_with_every_empty_prompt(prepared: Make, data: Any) -> None:
    ready = prepared(STEER_BY, *data)
    found = items(ready, 4000, caption_dropout=0.2, weights_dropout=0.3)
    assert np.mean([item.bare for item in found]) == pytest.approx(0.3, abs=0.025)
    assert np.mean([item.drop for item in found]) == pytest.approx(0.2, abs=0.025)
    both = np.mean([item.drop and item.bare for item in found])
    assert both == pytest.approx(0.06, abs=0.015)  # one says nothing of the other
    assert {item.bare for item in items(ready, 800, caption_dropout=0.2)} == {False}
    batch = ready.train.__getitems__(found[:200])
    assert batch.objective_weights is not None
    for item, weights in zip(found, batch.objective_weights.tolist(), strict=False):
        assert sum(weights) == pytest.approx(0.0 if item.drop or item.bare else 1.0)
    assert not torch.isnan(batch.objective_weights).any()
    by_key = {(item.place, item.draw): item.bare for item in found}
    other = PairStream(ready.train, 5, batch_size=16, rank=1, world_size=2, weights_dropout=0.3)
    assert all(by_key[item.place, item.draw] == item.bare for group in islice(other._items(), 20) for item in group)


def test_held_out_comparisons_are_always_told_their_weights(prepared: Make, data: Any) -> None:
    ready = prepared(STEER_BY, *data, "steer.dropout=1.0")
    assert not any(batch.objective_weights.any() for batch in islice(ready.batches(0), 3))  # type: ignore[union-attr]
    assert ready.held_out is not None
    (batch,) = fixed_draws(ready.held_out, 16, 2, 1)
    assert batch.objective_weights is not None
    assert batch.objective_weights[:4].tolist() == [[0.0, 1.0], [1.0, 0.0]] * 2


# ------------------------------------------------------------------------------------------------ equivalences
def test_chunks_and_a_bank_give_the_same_loss_and_gradient(prepared: Make, data: Any) -> None:
    common = (STEER_BY, *data, "train.batch_size=3", "objective.beta=50.0")
    found = []
    for more in ((), ("train.backward=chunked", "train.chunk=2"), ("reference.bank=1",)):
        ready = prepared(*common, *more)
        settled(ready.policy)
        batch = next(prepared(*common, "reference.bank=1").batches(0))
        loss, _ = ready.step(batch, Keyed(0))
        loss.mean().backward()
        found.append([loss.detach(), *(parameter.grad for parameter in trained(ready.policy).values())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("trainable", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_as_if_it_never_had(
    settings: Callable[..., Config], data: Any, tmp_path: Path, trainable: str
) -> None:
    common = (STEER_BY, *data, "train.save_every=2", "train.validate_every=2", "train.ema=0.5", f"trainable.kind={trainable}")
    runs.align(settings(tmp_path / "whole", *common, "train.steps=4"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=2"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=4"), resume=True, progress=False)
    states = [sorted((tmp_path / each / "state").iterdir())[-1] / "state.safetensors" for each in ("whole", "parts")]
    whole, parts = map(load_file, states)
    assert whole.keys() == parts.keys()
    assert "parameter/shift.layers.4.weight" in whole
    assert whole["parameter/shift.layers.4.weight"].any()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    files = [(tmp_path / each / "weights" / STEER).read_bytes() for each in ("whole", "parts")]
    assert files[0] == files[1]
    ema = load_file(tmp_path / "whole" / "weights" / STEER)
    assert torch.equal(ema["layers.4.weight"], whole["ema/shift.layers.4.weight"])
    with pytest.raises(flowalign.CheckpointError, match="steer"):
        runs.align(settings(tmp_path / "parts", *common, "steer.dropout=0.5", "train.steps=6"), resume=True, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("train/update_norm", 0) > 0 for line in lines)


# ------------------------------------------------------------------------------------------------ learned, saved, loaded
@pytest.fixture(scope="module")
def learned(
    settings: Callable[..., Config], weighed: dict[str, Path], clear: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    config = settings(
        tmp_path_factory.mktemp("steered") / "run",
        STEER_BY,
        f"model.checkpoint={clear}",
        f"data={{train: {weighed['train']}, validation: {weighed['held']}, resolution: 16}}",
        "objective.beta=100.0",
        "trainable.targets=[conv1, conv2, to_q, to_k, to_v, to_out.0, conv_in, conv_out]",
        "train.steps=60",
        "train.learning_rate=3e-2",
        "train.batch_size=8",
        "train.caption_dropout=0.1",
        "train.timestep_range=[0.2, 0.7]",
        "sample={count: 6, steps: 2}",
    )
    runs.align(config, progress=False)
    return config


def test_the_code_in_the_card_steers(learned: Config) -> None:
    pipe = drawn_by_the_card(Path(learned.output))["pipe"]
    assert steering_of(pipe).rows == ((0.5, 0.5),)  # type: ignore[union-attr]


def prefers_red(config: Config, weights: dict[str, float] | None) -> float:
    """Share of held-out pairs in which the red picture is denoised better than by the base, by diffusers' own pipeline."""
    ready = prepare(config, make_accelerator(config, Path(config.output)), progress=False)
    pipeline = StableDiffusionPipeline.from_pretrained(config.model.checkpoint, safety_checker=None)
    flowalign.steered(pipeline, config.output, weights)
    assert ready.held_out is not None
    (batch,) = fixed_draws(ready.held_out, 16, 1, 0)
    prompts = [ready.held_out.cached.prompts[place] for place in ready.held_out.cached.prompt]
    step, found = ready.step.on_held_out(), torch.zeros(16, 2)
    for draw in range(8):
        (batch,) = fixed_draws(ready.held_out, 16, 8, draw)
        x_t, target, t = step.noised(batch, Keyed(1))
        told = step.told(batch)
        tokens, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        steered = told.joined(CONTEXT, tokens.repeat_interleave(2, 0))
        with torch.no_grad():
            base = ready.family.predict(ready.family.denoiser, x_t, t, told) - target
            ours = ready.family.predict(pipeline.unet, x_t, t, steered) - target
        found += (base.square() - ours.square()).flatten(1).mean(1).view(16, 2)
    assert batch.objective_weights is not None
    chosen_is_red = batch.objective_weights[:, 0] > 0.5
    ahead = found[:, 0] > found[:, 1]
    return (ahead == chosen_is_red).float().mean().item()


def test_the_policy_prefers_what_the_weights_say(learned: Config) -> None:
    assert prefers_red(learned, {"red": 1}) >= 0.9
    assert prefers_red(learned, {"blue": 1}) <= 0.1  # with the weights swapped, the other way round
    lines = [json.loads(line) for line in (Path(learned.output) / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/rewards/accuracies"] for line in lines if "eval/rewards/accuracies" in line]
    assert held_out[-1] >= 0.8  # of single times and noises


def test_sample_pictures_are_drawn_in_the_middle_and_at_the_corners(learned: Config) -> None:
    steps = sorted((Path(learned.output) / "samples").iterdir())
    tables = [[json.loads(line) for line in (step / "metadata.jsonl").read_text().splitlines()] for step in steps]
    assert [row["weights"] for row in tables[-1]] == even_and_corners(learned.steer) * 2  # type: ignore[arg-type]
    assert [(row["prompt"], row["seed"]) for row in tables[-1]] == [("e thing", 0)] * 3 + [("f thing", 1)] * 3
    first, last = ([(step / row["file_name"]).read_bytes() for row in table] for step, table in zip(steps, tables, strict=True))
    assert first[0] == first[1] == first[2]  # the base, whatever the weights
    assert len(set(last)) == 6
    page = (Path(learned.output) / "report.html").read_text()
    assert "e thing (blue 0, red 1)" in page


def test_one_call_draws_what_the_run_drew(learned: Config, tmp_path: Path) -> None:
    """Plain diffusers with the run's folder, and the command: the pictures of the training run, to the last bit."""
    rows = [
        json.loads(line) for line in (Path(learned.output) / "samples/step-00000060/metadata.jsonl").read_text().splitlines()
    ]
    row = rows[1]
    expected = Image.open(Path(learned.output) / "samples/step-00000060" / row["file_name"])
    pipeline = StableDiffusionPipeline.from_pretrained(learned.model.checkpoint, safety_checker=None)
    base = pipeline.unet.state_dict().keys()
    drawn = SamplerSettings(steps=2, guidance=row["guidance"], height=16, width=16)

    def picture() -> Image.Image:
        ((_, found),) = sample(pipeline, [row["prompt"]], [row["seed"]], drawn, progress=False)
        return found

    before = picture()
    flowalign.steered(pipeline, learned.output, row["weights"])
    assert picture().tobytes() == expected.tobytes()
    flowalign.steered(pipeline, Path(learned.output) / "weights", {"blue": 1})
    assert picture().tobytes() != expected.tobytes()
    flowalign.unsteered(pipeline)
    assert pipeline.unet.state_dict().keys() == base
    assert picture().tobytes() == before.tobytes()
    arguments = dict(seeds=[row["seed"]], steps=2, guidance=row["guidance"], progress=False)
    runs.generate(learned.output, [row["prompt"]], out=tmp_path / "told", weights={"red": 2.0}, **arguments)
    runs.generate(learned.output, [row["prompt"]], out=tmp_path / "untold", **arguments)
    told, untold = (json.loads((tmp_path / each / "metadata.jsonl").read_text().splitlines()[0]) for each in ("told", "untold"))
    assert told["weights"] == {"red": 1.0, "blue": 0.0}
    assert "weights" not in untold
    with pytest.raises(ConfigError, match="weights name 'green'"):
        runs.generate(learned.output, ["a"], out=tmp_path / "x", weights={"green": 1.0}, progress=False)


# ------------------------------------------------------------------------------------------------ plan, refusals
def test_a_run_does_not_go_on_without_what_steers_it(learned: Config) -> None:
    with pytest.raises(CheckpointError, match=r"other settings: steer was \{.*\} and is None"):
        runs.align(learned.model_copy(update={"steer": None}), resume=True, progress=False)


def test_the_plan_counts_the_network(settings: Callable[..., Config], data: Any, tmp_path: Path) -> None:
    plain, steered, words = (runs.plan(settings(tmp_path, *data, *more)) for more in ((), (STEER_BY,), (IN_WORDS,)))
    extra = steered["parameters"]["trained"] - plain["parameters"]["trained"]
    assert extra == (2 * 16 + 16) + (16 * 16 + 16) + (16 * 32 + 32)
    assert words["parameters"] == plain["parameters"]
    assert steered["flops_per_comparison"]["reference"] == plain["flops_per_comparison"]["reference"]
    assert steered["flops_per_comparison"]["policy_forward"] > plain["flops_per_comparison"]["policy_forward"]
    apart = runs.plan(settings(tmp_path, *data, "steer={objectives: [red, blue], hidden: 16, contrast: 1.0}"))
    assert apart["parameters"] == steered["parameters"]
    assert apart["flops_per_comparison"]["policy_forward"] > steered["flops_per_comparison"]["policy_forward"]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("reference.kind=ema", "but reference.kind 'ema' follows it, and it is held against a model that is told no weights"),
        ("reference.kind=refresh", "'refresh' follows it"),
        ("reference.kind=start trainable.start=x", "'start' is like it, and it is held against a model"),
        ("switches.annotator_types=2", "switches.annotator_types 2 trains several"),
        ("train.compile=true", "train.compile compiles a denoiser that is called by itself"),
        ("train.seed=1", "and 2 comparisons have no objective_weights to say what they hold under"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: Callable[..., Config], tmp_path: Path, override: str, what: str
) -> None:
    config = settings(tmp_path, STEER_BY, *override.split())
    objective, knobs = load_objective(config)
    family: Any = None  # which these rules do not look at
    weights = np.array([[np.nan] * 2, [0.5, 0.5], [np.nan] * 2], np.float32)
    train: Any = SimpleNamespace(objective_weights=weights, pictures=np.zeros((3, 2, 32)), num_chosen=1)
    with pytest.raises(ConfigError, match=f"steer makes one policy of 2 objectives, .*{what}"):
        check(config, family, objective, knobs, train)


@pytest.mark.parametrize(
    ("steer", "what"),
    [
        ("{objectives: [a]}", "steer.objectives cannot be .*at least 2 items"),
        ("{objectives: [a, a]}", "it names each once"),
        ("{objectives: [a, b], form: tokenz}", "steer.form cannot be 'tokenz'; did you mean 'tokens'"),
        ("{objectives: [a, b], hiden: 3}", "steer.hiden is not a setting; did you mean 'hidden'"),
        ("{form: prompt}", "steer.objectives is missing; set it to names of the objectives"),
    ],
)
def test_settings_that_cannot_be_are_said_in_a_sentence(
    settings: Callable[..., Config], tmp_path: Path, steer: str, what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        settings(tmp_path, f"steer={steer}")
