"""A bank of reference errors: what it stores is what the reference gives, and when it must not be used again."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowalign import runs
from flowalign.align import bank, fill
from flowalign.align.bank import Stored
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch
from flowalign.data.cache import clear, usage
from flowalign.errors import ConfigError, DataError, NonFiniteError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]
BANK = "reference.bank=2"


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return f"data.cache={tmp_path / 'cache'}"


def count_reference(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From now on, how many pictures the reference is asked about."""
    calls: Counter[str] = Counter()
    own = PreferenceStep._anchor

    def counted(self: PreferenceStep, x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls["pictures"] += len(x_t)
        return own(self, x_t, *rest)

    monkeypatch.setattr(PreferenceStep, "_anchor", counted)
    return calls


def no_reference(self: PreferenceStep, batch: Batch, rng: Keyed) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("the reference ran")


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("timesteps", ["uniform", "stratified"])
def test_stored_errors_are_those_of_the_reference(prepared: Make, cache: str, timesteps: str, trainable: str) -> None:
    """Twelve comparisons in batches of five: batches of other rows, and a last one that was filled up."""
    settings = [cache, f"train.timesteps={timesteps}", "train.batch_size=5", "train.caption_dropout=0.5", "data.flip=true"]
    ready = prepared(BANK, f"trainable.kind={trainable}", *settings)
    live = replace(prepared(f"trainable.kind={trainable}", *settings).step, bank=None)
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) < 1e-3
    for batch in islice(ready.batches(0), 6):
        stored, found = (step.terms(batch, Keyed(0)).reference_error for step in (ready.step, live))
        torch.testing.assert_close(stored, found, rtol=0, atol=5e-7)  # a row's last bits depend on its place in the batch


def test_every_comparison_keeps_its_two_draws_over_the_epochs(prepared: Make, cache: str) -> None:
    ready = prepared(BANK, cache, "train.caption_dropout=0.5")
    seen: dict[int, set[Any]] = {}
    for batch in islice(ready.batches(0), 6 * 6):  # six epochs of twelve, two at a time
        x_t, _, t = ready.step.noised(batch, Keyed(0))
        embeds = batch.conditioning.tensors["prompt_embeds"]
        for row, example in enumerate(batch.ids):
            fixed = (t[2 * row].item(), x_t[2 * row].sum().item(), embeds[row].sum().item())
            seen.setdefault(example, set()).add(fixed)
    assert [len(draws) for draws in seen.values()] == [2] * 12
    assert len({draw[0] for draws in seen.values() for draw in draws}) == 24


def test_a_bank_is_used_again_unless_what_it_depends_on_has_changed(
    prepared: Make, cache: str, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
) -> None:
    prepared(BANK, cache)
    other = {name: shutil.copytree(folders["epsilon"], tmp_path / name) for name in ("weight", "schedule")}
    weights = load_file(other["weight"] / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({**weights, "conv_in.bias": weights["conv_in.bias"] + 1e-6}, other["weight"] / "unet" / "changed")
    (other["weight"] / "unet" / "changed").replace(other["weight"] / "unet" / "diffusion_pytorch_model.safetensors")
    schedule = other["schedule"] / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"prediction_type": "v_prediction"}))
    monkeypatch.setattr(PreferenceStep, "for_bank", no_reference)
    free = ("objective.beta=77.0", "train.learning_rate=0.5", "objective.name=hinge", "trainable.rank=2", "trainable.kind=full")
    for change in free:
        prepared(BANK, cache, change)
    bound = (
        "reference.bank=3",
        "train.seed=1",
        "train.timestep_range=[0.0, 0.9]",
        "train.batch_size=3",
        "train.caption_dropout=0.3",
        "train.timesteps=uniform",
        "train.precision=bf16",
        "train.tf32=false",
        "train.validation_draws=2",
        "data.flip=true",
        "data.limit=11",
        f"model.checkpoint={other['weight']}",
        f"model.checkpoint={other['schedule']}",
    )
    for change in bound:
        with pytest.raises(RuntimeError, match="the reference ran"):
            prepared(BANK, cache, change)
    monkeypatch.setattr(fill, "kind_of", lambda device: "another processor")
    with pytest.raises(RuntimeError, match="the reference ran"):
        prepared(BANK, cache)


def test_a_gpu_is_told_from_others_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert [fill.kind_of(torch.device(name)) for name in ("cpu", "cuda:1")] == ["cpu", "card 1"]


def test_a_full_fine_tune_needs_no_second_model(prepared: Make, cache: str) -> None:
    ready = prepared(BANK, cache, "trainable.kind=full")
    assert ready.step.reference is None
    assert ready.policy is ready.family.denoiser
    batch = ready.first_batch()
    before = ready.step.terms(batch, Keyed(0))
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = ready.step.terms(batch, Keyed(0))
    assert torch.equal(before.reference_error, after.reference_error)
    assert float((after.policy_error - before.policy_error).detach().abs().max()) > 1e-3


def test_what_is_missing_or_damaged_is_computed_again_and_nothing_else(
    prepared: Make, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bank, "PART", 5)  # two batches of two
    calls = []
    own = PreferenceStep.for_bank
    monkeypatch.setattr(
        PreferenceStep, "for_bank", lambda self, batch, rng: calls.append(batch.positions) or own(self, batch, rng)
    )
    prepared(cache, "reference.bank=3")
    files = sorted((tmp_path / "cache").glob("bank-*/draw-*.safetensors"))
    assert len(files) == 3 * 3 + 3  # train and held out
    whole = {path: path.read_bytes() for path in files}
    assert len(calls) == 4 * 6  # twelve comparisons, two at a time
    calls.clear()
    train = [path for path in files if (path.parent / "draw-00002-000000.safetensors").exists()]
    assert [path.name for path in train[3:5]] == ["draw-00001-000000.safetensors", "draw-00001-000001.safetensors"]
    train[4].unlink()
    train[8].write_bytes(train[8].read_bytes()[:-40])
    prepared(cache, "reference.bank=3")
    assert calls == [tuple(place * 3 + 1 for place in places) for places in ((4, 5), (6, 7))] + [
        tuple(place * 3 + 2 for place in places) for places in ((8, 9), (10, 11))
    ]
    assert {path: path.read_bytes() for path in files} == whole


def test_parts_are_whole_batches_and_give_the_bits_of_one(
    prepared: Make, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twelve comparisons in batches of five, of which the last is filled up; in parts of one batch, of two, and of all."""
    settings, found = ("train.batch_size=5", "objective.name=dspo", "train.caption_dropout=0.5", "data.flip=true"), []
    for part in (1, 14, 128):
        monkeypatch.setattr(bank, "PART", part)
        ready = prepared(BANK, cache, *settings)
        stored = ready.step.bank
        assert stored is not None
        batches = list(islice(ready.batches(0), 6))
        found.append([(stored(batch).clone(), stored.predicted(batch)) for batch in batches])
        assert [len(parts) for parts in stored.predictions] == [{1: 3, 14: 2, 128: 1}[part]] * 2
        for folder in (tmp_path / "cache").glob("bank-*"):
            shutil.rmtree(folder)
    assert len({tuple(batch.positions) for batch in batches}) > 1
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(left, right, strict=True))


class Places(SimpleNamespace):
    """As much of a batch as filling looks at."""

    def __len__(self) -> int:
        return len(self.positions)


def test_a_fill_holds_one_part_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 predictions of 2 MiB, 192 in all, in parts of 8; of what is read, nothing is in memory until it is asked for."""
    monkeypatch.setattr(bank, "PART", 8)
    count, shape = 96, (1, 8, 256, 256)
    held = []

    def private() -> int:
        """MiB of memory that is no file's."""
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) // 1024

    def batches(draw: int, places: range) -> Iterator[Any]:
        for start in range(0, len(places), 4):
            positions = tuple(places[start : start + 4])
            yield Places(positions=positions, mean=torch.zeros(4, *shape))

    def reference(batch: Any) -> dict[str, torch.Tensor]:
        held.append(private())
        rows = torch.tensor(batch.positions).float()
        return {"errors": rows[:, None], "predictions": rows.view(-1, 1, 1, 1, 1).expand(-1, *shape)}

    before = private()
    stored = Stored(torch.float32)
    filled = bank.fill_bank(tmp_path, batches, reference, count=count, draws=1, batch_size=4, stored=stored, progress=False)
    assert max(held) - before < 150
    assert private() - before < 150
    asked = Places(positions=(17, 95))
    assert torch.equal(filled.predicted(asked)[:, 0, 0, 0, 0], torch.tensor([17.0, 95.0]))  # type: ignore[arg-type]


@dataclass
class First:
    """Process 0 of two, of which the other answers alike but writes elsewhere."""

    count: int = 2
    index: int = 0
    met: int = 0

    def gather(self, value: Any) -> list[Any]:
        self.met += 1
        return [value, value]


def test_a_part_that_another_process_wrote_elsewhere_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten parts of which each has five: they meet before, about the disk, and after each of its five."""
    monkeypatch.setattr(bank, "PART", 1)

    def batches(draw: int, places: range) -> Iterator[Any]:
        yield Places(positions=tuple(places), mean=torch.zeros(1, 2, 4, 8, 8))

    def reference(batch: Any) -> dict[str, torch.Tensor]:
        return {"errors": torch.tensor(batch.positions)[:, None].float()}

    ranks = First()
    with pytest.raises(DataError, match=r"draw-00000-000001\.safetensors' was written and cannot be read; all processes"):
        bank.fill_bank(tmp_path, batches, reference, count=10, draws=1, batch_size=1, ranks=ranks, progress=False)  # type: ignore[arg-type]
    assert ranks.met == 1 + 1 + 5
    assert len(list(tmp_path.iterdir())) == 5


def test_a_run_with_a_bank_is_the_run_with_the_reference_on_the_same_draws(
    settings: Callable[..., Config], cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = []
    for name in ("bank", "live"):
        config = settings(tmp_path / name, BANK, cache, "train.steps=14")  # into the third epoch
        metrics = runs.align(config, progress=False)["metrics"]
        state = load_file(tmp_path / name / "weights" / "pytorch_lora_weights.safetensors")
        weights.append((state, {key: value for key, value in metrics.items() if key.startswith(("eval/", "train/loss"))}))
        read = PreferenceStep.terms
        monkeypatch.setattr(
            PreferenceStep, "terms", lambda self, batch, rng, read=read: read(replace(self, bank=None), batch, rng)
        )
    assert weights[0][1] == weights[1][1]
    assert all(torch.equal(weights[1][0][name], tensor) for name, tensor in weights[0][0].items())


LOSSES = """
from torch.nn.functional import logsigmoid
from flowalign.align.terms import needs

@needs("reference", "drift")
def drifting(terms, *, beta: float = 500.0):
    return -logsigmoid(beta * (terms.margin - terms.drift.mean(1)))

@needs()
def alone(terms):
    return terms.policy_error[:, 0]
"""


@pytest.fixture
def installed(install: Callable[..., None]) -> None:
    """A package that offers an objective that needs all there is, and one that needs no reference."""
    install("bank_losses", LOSSES, "drifting = bank_losses:drifting", "alone = bank_losses:alone")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stored_predictions_give_the_drift(prepared: Make, cache: str, precision: str) -> None:
    """Of a policy that has moved; in the precision that the denoiser itself answers in, so that nothing is rounded."""
    settings = [cache, "objective={name: drifting}", f"train.precision={precision}", "train.batch_size=5", "data.flip=true"]
    ready = prepared(BANK, *settings)
    live = replace(prepared(*settings).step, bank=None, policy=ready.policy)
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert ready.step.bank is not None
    assert {part.dtype for draw in ready.step.bank.predictions for part in draw} == {
        torch.float32 if precision == "fp32" else torch.bfloat16
    }
    for batch in islice(ready.batches(0), 6):
        stored, found = (step.terms(batch, Keyed(0)) for step in (ready.step, live))
        assert stored.drift is not None
        assert float(stored.drift.detach().min()) > 1e-4
        answer = live.for_bank(batch, Keyed(0))[1]
        assert torch.equal(answer, answer.to(ready.step.bank.predictions[0][0].dtype).float())
        tolerance = dict(rtol=1e-4, atol=5e-7) if precision == "fp32" else dict(rtol=5e-2, atol=1e-4)
        torch.testing.assert_close(stored.drift, found.drift, **tolerance)
        torch.testing.assert_close(stored.reference_error, found.reference_error, **tolerance)


@pytest.mark.usefixtures("installed")
def test_predictions_are_stored_where_they_are_needed_and_errors_serve_both(
    prepared: Make, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = count_reference(monkeypatch)
    small = prepared(BANK, cache)
    assert small.step.bank is not None
    assert small.step.bank.predictions == ()
    assert calls.pop("pictures") == (2 + 1) * 12 * 2
    sizes = {path: path.stat().st_size for path in (tmp_path / "cache").glob("bank-*/draw-*.safetensors")}
    prepared(BANK, cache, "objective={name: drifting}")  # errors alone are not enough
    assert calls.pop("pictures") == (2 + 1) * 12 * 2
    grown = {path: path.stat().st_size for path in (tmp_path / "cache").glob("bank-*/draw-*.safetensors")}
    latents = (2, *small.first_batch().mean.shape[2:])
    for path, size in sizes.items():
        assert grown[path] - size == pytest.approx(Stored(torch.float32).size(12, latents) - Stored().size(12, latents), abs=99)
    for change in ("objective={name: drifting}", "objective={name: hinge}", "objective={name: drifting, beta: 3.0}"):
        prepared(BANK, cache, change)
    assert not calls


@pytest.mark.usefixtures("installed")
def test_a_bank_for_an_objective_without_a_reference_is_refused(prepared: Make, cache: str) -> None:
    with pytest.raises(ConfigError, match=r"'alone' needs no reference; set reference\.bank=null"):
        prepared(BANK, cache, "objective={name: alone}")


def test_a_bank_says_what_it_is_of_and_when_it_was_used(
    prepared: Make, cache: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def banks() -> list[dict[str, Any]]:
        found = (store for store in usage(tmp_path / "cache")["stores"] if store["kind"] == "bank")
        return sorted(found, key=lambda store: -store["draws"])

    ready = prepared(cache, "reference.bank=3", "train.precision=bf16")
    found = banks()
    assert [(store["pairs"], store["draws"], store["precision"]) for store in found] == [(12, 3, "bf16"), (12, 1, "bf16")]
    assert {store["denoiser"] for store in found} == {ready.family.fingerprint("denoiser")}
    assert {store["checkpoint"] for store in usage(tmp_path / "cache")["stores"]} == {str(folders["epsilon"])}
    assert [store["store"] for store in found] == [f"bank-{store['fingerprint']}" for store in found]
    for path in (tmp_path / "cache").glob("bank-*/*"):
        os.utime(path, (1e9, 1e9))
    assert {store["used"] for store in banks()} == {"2001-09-09T01:46:40+00:00"}
    (tmp_path / "cache" / found[1]["store"] / "about.json").unlink()  # as banks of earlier versions are
    prepared(cache, "reference.bank=3", "train.precision=bf16")
    assert all(store["used"] >= first["used"] for store, first in zip(banks(), found, strict=True))
    clear(tmp_path / "cache", ready.family.fingerprint("denoiser"))
    assert banks() == []


def test_a_bank_that_may_only_be_read_is_read(
    prepared: Make, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(store: Path, about: Any) -> None:
        raise PermissionError(store)

    prepared(cache, BANK)
    calls = count_reference(monkeypatch)
    monkeypatch.setattr(fill, "describe", refused)
    assert prepared(cache, BANK).step.bank is not None
    assert not calls


def test_a_bank_that_the_disk_cannot_hold_is_refused_before_it_is_filled(
    prepared: Make, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(cache)  # pictures and prompts are there, and only the bank asks for room
    calls = count_reference(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(ConfigError, match=r"needs [\d.]+ (bytes|KiB) in .*, where 100 bytes are free; set data\.cache"):
        prepared(BANK, cache)
    assert not calls


def test_errors_that_are_not_finite_are_not_stored(
    prepared: Make, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(self: PreferenceStep, batch: Batch, rng: Keyed) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((len(batch), 2), torch.nan), batch.mean

    monkeypatch.setattr(PreferenceStep, "for_bank", broken)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        prepared(cache, BANK)
    assert not list((tmp_path / "cache").glob("bank-*/*.safetensors"))
