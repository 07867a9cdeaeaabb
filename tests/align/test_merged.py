"""Several references as one: what they say is their merged Gaussians', LoRA runs share tensors, and what cannot is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from scipy.special import logsumexp

from flowalign import runs
from flowalign.align.merged import Merged, clipped, harmonic, shares
from flowalign.errors import CheckpointError, ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config, Reference
from flowalign.setup import Prepared
from tests.align.test_reference import storages

Make = Callable[..., Prepared]
NAMED = Reference(kind="merged", checkpoints=("a", "b", "c"))
SHARES = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def trained(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of one tiny model: two LoRAs, and one of all weights."""
    folder = tmp_path_factory.mktemp("references")
    for name, more in {
        "lora": ("objective={name: dpo}", "trainable.rank=2"),
        "other": ("objective={name: hinge}", "trainable.rank=3"),
        "full": ("trainable.kind=full", "train.learning_rate=1e-4"),
    }.items():
        runs.align(settings(folder / name, *more, "train.steps=2", "data.validation=null", "sample.count=1"), progress=False)
    return {name: folder / name for name in ("lora", "other", "full")}


def merged(*checkpoints: Path | str, more: str = "") -> str:
    return f"reference={{kind: merged, checkpoints: {json.dumps([str(each) for each in checkpoints])}{more}}}"


def said(weights: tuple[float, ...] = SHARES, **settings: object) -> tuple[list[torch.Tensor], torch.Tensor, Merged]:
    """Three predictions `[5, 2, 3, 3]`, a target, and their Merged: its denoisers are only names for them."""
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randn(5, 2, 3, 3, generator=generator) for _ in weights]
    target = torch.randn(5, 2, 3, 3, generator=generator)
    changed = {"checkpoints": NAMED.checkpoints[: len(weights)], "weights": weights, **settings}
    denoisers = [torch.nn.Linear(1, 1) for _ in weights]
    return predictions, target, Merged(denoisers, NAMED.model_copy(update=changed))


def answer(predictions: list[torch.Tensor], target: torch.Tensor, reference: Merged) -> tuple[torch.Tensor, torch.Tensor]:
    by = {id(denoiser): prediction for denoiser, prediction in zip(reference.denoisers, predictions, strict=True)}
    return reference(lambda denoiser: by[id(denoiser)], lambda predicted: (predicted - target).square().flatten(1).mean(1))


def test_the_mean_of_predictions_is_the_normalised_geometric_mean_of_gaussians() -> None:
    """In one dimension by quadrature: the product of N(μ_k, 1)^α_k over its integral."""
    means, grid = (-1.3, 0.2, 2.0), np.linspace(-12, 12, 20_001)
    density = np.exp(sum(-0.5 * share * (grid - mean) ** 2 for share, mean in zip(SHARES, means, strict=True)))
    density /= np.trapezoid(density, grid)
    predictions = [torch.full((1, 1, 1, 1), mean) for mean in means]
    for target in (-0.7, 0.9):
        _, _, reference = said()
        error, mean = answer(predictions, torch.full((1, 1, 1, 1), target), reference)
        expected = np.log(np.interp(target, grid, density))
        assert -0.5 * error.item() - 0.5 * np.log(2 * np.pi) == pytest.approx(expected, abs=1e-5)
        assert mean.item() == pytest.approx(np.trapezoid(grid * density, grid), abs=1e-6)


def test_its_error_is_the_mean_error_less_how_far_they_disagree() -> None:
    predictions, target, reference = said()
    error, mean = answer(predictions, target, reference)
    torch.testing.assert_close(mean, sum(share * each for share, each in zip(SHARES, predictions, strict=True)))

    def size(values: torch.Tensor) -> torch.Tensor:
        return values.square().flatten(1).mean(1)

    pairs = list(zip(SHARES, predictions, strict=True))
    expected = sum(share * (size(each - target) - size(each - mean)) for share, each in pairs)
    torch.testing.assert_close(error, expected)


@pytest.mark.parametrize("sharpness", [0.5, 7.0, 2000.0])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_harmonic_mean_is_mrpos_closed_form(sharpness: float, clip: float | None) -> None:
    """log r1 + log r2 − log(α2 r1 + α1 r2) with log r = −½κe, by SciPy; errors clipped to the first one's neighbourhood."""
    predictions, target, reference = said((0.6, 0.4), merge="harmonic", sharpness=sharpness, clip=clip)
    found, mean = answer(predictions, target, reference)
    first, second = ((each - target).square().flatten(1).mean(1).double().numpy() for each in predictions)
    if clip is not None:
        second = np.minimum(np.maximum(second, first * (1 - clip)), first * (1 + clip))
    one, two = -0.5 * sharpness * first, -0.5 * sharpness * second
    log = one + two - logsumexp(np.stack([one, two]), b=np.array([[0.4], [0.6]]), axis=0)
    assert found.tolist() == pytest.approx((-2 * log / sharpness).tolist(), rel=1e-4)
    torch.testing.assert_close(mean, 0.6 * predictions[0] + 0.4 * predictions[1])


def test_the_harmonic_mean_lies_between_the_mean_error_and_the_largest() -> None:
    errors = torch.tensor([[0.2, 0.5], [0.4, 0.1], [0.3, 0.35]], dtype=torch.float64)
    weights = torch.tensor(SHARES, dtype=torch.float64)
    torch.testing.assert_close(harmonic(errors, weights, 1e-6), weights @ errors, atol=1e-6, rtol=0)
    torch.testing.assert_close(harmonic(errors, weights, 1e5), errors.max(0).values, atol=1e-4, rtol=0)
    assert (harmonic(errors, weights, 10.0) > weights @ errors).all()
    assert clipped(errors, 0.25).tolist() == pytest.approx(np.array([[0.2, 0.5], [0.25, 0.375], [0.25, 0.375]]))


def test_one_model_twice_is_that_model(prepared: Make, folders: dict[str, Path]) -> None:
    ready = prepared(merged(folders["epsilon"], folders["epsilon"]))
    reference = ready.step.reference
    assert isinstance(reference, Merged)
    batch = ready.first_batch()
    expected = replace(ready.step, reference=ready.family.denoiser).terms(batch, Keyed(0)).reference_error
    for merge in ("predictions", "harmonic"):
        both = Merged(list(reference.denoisers), reference.settings.model_copy(update={"merge": merge}))
        torch.testing.assert_close(replace(ready.step, reference=both).terms(batch, Keyed(0)).reference_error, expected)
    assert ready.at_start.self_test(batch, Keyed(0)) == 0.0


def test_references_are_what_plain_diffusers_loads_and_share_the_pretrained_tensors(
    prepared: Make, folders: dict[str, Path], trained: dict[str, Path]
) -> None:
    names = (folders["epsilon"], trained["lora"], trained["full"])
    ready = prepared(merged(*names, more=", weights: [0.5, 0.3, 0.2]"))
    reference = ready.step.reference
    assert isinstance(reference, Merged)
    base, lora, full = reference.denoisers
    assert base is ready.family.denoiser
    assert storages(lora) == storages(base)
    assert not set(storages(full).values()) & set(storages(base).values())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    batch = ready.first_batch()
    x_t, target, t = ready.step.noised(batch, Keyed(0))
    own = [StableDiffusionPipeline.from_pretrained(folders["epsilon"], safety_checker=None) for _ in range(2)]
    own[1].load_lora_weights(trained["lora"] / "weights")
    own.append(StableDiffusionPipeline.from_pretrained(trained["full"] / "weights", safety_checker=None))
    with torch.no_grad():
        outputs = [ready.family.predict(each.unet, x_t, t, ready.step.told(batch)) for each in own]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4
    mean = 0.5 * outputs[0] + 0.3 * outputs[1] + 0.2 * outputs[2]
    expected = (mean - target).square().flatten(1).mean(1).view(2, 2)
    torch.testing.assert_close(ready.step.terms(batch, Keyed(0)).reference_error, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_training_moves_none_of_the_references(prepared: Make, trained: dict[str, Path], trainable: str) -> None:
    ready = prepared(merged(trained["lora"], trained["other"]), f"trainable.kind={trainable}")
    reference = ready.step.reference
    assert reference is not None
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for batch in islice(ready.batches(0), 2):
        loss, _ = ready.step(batch, Keyed(0))
        loss.mean().backward()
        ready.optimizer.step()
        ready.optimizer.zero_grad()
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())


def test_a_bank_stores_what_they_say_together(prepared: Make, trained: dict[str, Path], tmp_path: Path) -> None:
    cache, two = f"data.cache={tmp_path / 'cache'}", (trained["lora"], trained["other"])
    live = prepared(merged(*two, more=", merge: harmonic"), cache)
    banked = prepared(merged(*two, more=", merge: harmonic, bank: 1"), cache)
    assert banked.step.reference is None
    batch = banked.first_batch()
    found, expected = (each.step.terms(batch, Keyed(0)).reference_error for each in (banked, live))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    banks = {path.name for path in (tmp_path / "cache").glob("bank-*")}
    prepared(merged(trained["lora"], trained["full"], more=", merge: harmonic, bank: 1"), cache)
    prepared(merged(*two, more=", weights: [0.9, 0.1], merge: harmonic, bank: 1"), cache)
    assert len({path.name for path in (tmp_path / "cache").glob("bank-*")} - banks) == 4  # train and held out, each


def test_a_run_says_what_it_was_held_against_and_refuses_to_go_on_with_others(
    settings: Callable[..., Config], trained: dict[str, Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(trained["lora"], tmp_path / "reference")
    config = settings(tmp_path / "run", merged(moved, trained["other"]), "train.steps=1")
    runs.align(config, progress=False)
    (state,) = (tmp_path / "run" / "state").iterdir()
    assert len(set(json.loads((state / "about.json").read_text())["references"]["denoisers"])) == 2
    shutil.copytree(trained["other"] / "weights", moved / "weights", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"other settings: references\.denoisers was"):
        runs.align(config, resume=True, progress=False)


def test_the_plan_counts_every_reference(settings: Callable[..., Config], trained: dict[str, Path], tmp_path: Path) -> None:
    plain = runs.plan(settings(tmp_path))
    several = runs.plan(settings(tmp_path, merged(trained["full"], trained["full"], trained["lora"])))
    one, three = (found["flops_per_comparison"]["reference"] for found in (plain, several))
    assert 3 * one < three < 3.1 * one  # the adapter's own products
    forwards = [found["run"]["reference_forwards"]["live"] for found in (plain, several)]
    assert forwards[1] == 3 * forwards[0]
    held = {part["name"]: part for part in several["memory"]["parts"]}["reference"]
    assert held["bytes"] > 2 * 4 * several["parameters"]["denoiser"]
    assert held["how"] == "what 3 models do not share with the policy"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"checkpoints": ()}, r"takes two models or more, and reference\.checkpoints names 0"),
        ({"checkpoints": ("a",)}, r"takes two models or more, and reference\.checkpoints names 1"),
        ({"weights": (0.5, 0.5, 0.1)}, r"are 3 and sum to 1\.1; allowed: one above 0 for each of the 3"),
        ({"weights": (1.0,)}, r"are 1 and sum to 1; allowed"),
    ],
)
def test_shares_are_checked(given: dict[str, Any], what: str) -> None:
    assert shares(NAMED) == pytest.approx([1 / 3] * 3)
    with pytest.raises(ConfigError, match=what):
        shares(NAMED.model_copy(update=given))


@pytest.mark.parametrize(
    ("objective", "override", "what"),
    [
        ("dpo", "reference={kind: auto, checkpoints: [a]}", r"names 1 models, and reference\.kind 'auto' reads none"),
        ("simpo", merged("a", "b"), "'simpo' needs none; set reference.kind=auto"),
        ("epsilon_dpo", merged("a", "b", more=", merge: harmonic"), "'epsilon_dpo' reads the predictions of one reference"),
    ],
)
def test_what_does_not_go_together_is_refused(prepared: Make, objective: str, override: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        prepared(override, f"objective={{name: {objective}}}")


def test_drift_is_to_the_mean_prediction(prepared: Make, trained: dict[str, Path]) -> None:
    ready = prepared(merged(trained["lora"], trained["other"]), "objective={name: epsilon_dpo}")
    loss, metrics = ready.step(ready.first_batch(), Keyed(0))
    assert loss.isfinite().all()
    assert metrics["rewards/margins"].abs().max() > 0  # the policy starts beside them, not at them


def test_checkpoints_that_say_something_else_are_refused(
    prepared: Make, folders: dict[str, Path], emoji: Path, tmp_path: Path
) -> None:
    base = folders["epsilon"]
    with pytest.raises(CheckpointError, match="predicts another target or was trained with another noise schedule"):
        prepared(merged(base, folders["sample"]))
    with pytest.raises(CheckpointError, match="of the family 'sd3', and the model is of 'sd'"):
        prepared(merged(base, emoji / "tiny-sd3"))
    with pytest.raises(CheckpointError, match=r"cross_attention_dim \d+, and the model's has 32"):
        prepared(merged(base, emoji / "tiny-sd"))
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        prepared(merged(base, "nowhere"))
