"""Training that begins at an earlier run's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from flowalign import config, runs
from flowalign.errors import ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

LORA = "pytorch_lora_weights.safetensors"
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def first(settings: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """first("lora" or "full"): a finished run."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("first") / kind
            rate = 1e-2 if kind == "lora" else 1e-3
            runs.align(
                settings(made[kind], f"trainable.kind={kind}", "train.steps=3", f"train.learning_rate={rate}"), progress=False
            )
        return made[kind]

    return run


def adapters(ready: Prepared) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(ready.policy).items()}


def test_weights_loaded_are_weights_saved(first: Callable[[str], Path], prepared: Callable[..., Prepared]) -> None:
    ready = prepared(f"trainable.start={first('lora')}")
    saved = load_file(first("lora") / "weights" / LORA)
    found = adapters(ready)
    assert {f"unet.{name}" for name in found} == saved.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, saved[f"unet.{name}"], atol=1e-6, rtol=0)


def test_all_weights_loaded_are_all_weights_saved(first: Callable[[str], Path], prepared: Callable[..., Prepared]) -> None:
    ready = prepared("trainable.kind=full", f"trainable.start={first('full')}")
    saved = load_file(first("full") / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in ready.policy.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], atol=1e-6, rtol=0)
    base = ready.family.denoiser.state_dict()
    assert any(not torch.equal(base[name], saved[name]) for name in saved)  # the reference is still the model itself


def margin(ready: Prepared) -> float:
    with torch.no_grad():
        return float(ready.step.terms(ready.first_batch(), Keyed(0)).log_ratio.abs().max())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_is_the_model_or_where_training_begins(
    first: Callable[[str], Path], prepared: Callable[..., Prepared], kind: str
) -> None:
    start = (f"trainable.kind={kind}", f"trainable.start={first(kind)}")
    for reference, at_zero in (("auto", False), ("copy", False), ("start", True), ("ema", True), ("refresh", True)):
        ready = prepared(*start, f"reference.kind={reference}")
        assert (margin(ready) < 1e-6) is at_zero, reference
        assert ready.at_start.self_test(ready.first_batch(), Keyed(0)) < 1e-3


def test_a_start_reference_stays_while_the_policy_moves(
    first: Callable[[str], Path], prepared: Callable[..., Prepared]
) -> None:
    ready = prepared(f"trainable.start={first('lora')}", "reference.kind=start")
    before = ready.step.terms(ready.first_batch(), Keyed(0))
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter.add_(0.05)
    after = ready.step.terms(ready.first_batch(), Keyed(0))
    assert torch.equal(before.reference_error, after.reference_error)
    assert not torch.equal(before.policy_error, after.policy_error)


def test_from_a_run_of_no_steps_is_from_the_start(settings: Make, tmp_path: Path, prepared: Callable[..., Prepared]) -> None:
    """Adapters as they are made from the seed, written by hand: a run that learned nothing writes none."""
    empty = tmp_path / "empty"
    (empty / "weights").mkdir(parents=True)
    save_file({f"unet.{name}": tensor.contiguous() for name, tensor in adapters(prepared()).items()}, empty / "weights" / LORA)
    (empty / "config.yaml").write_text(config.dump(settings(empty)))
    runs.align(settings(tmp_path / "fresh"), progress=False)
    runs.align(settings(tmp_path / "from", f"trainable.start={empty}"), progress=False)
    fresh, other = (load_file(tmp_path / name / "weights" / LORA) for name in ("fresh", "from"))
    assert all(torch.equal(fresh[name], other[name]) for name in fresh)


def test_a_run_goes_on_from_a_start_as_if_it_had_not_stopped(
    first: Callable[[str], Path], settings: Make, tmp_path: Path
) -> None:
    start = (f"trainable.start={first('lora')}", "reference.kind=start", "train.save_every=1")
    whole = settings(tmp_path / "whole", *start)
    runs.align(whole, progress=False)
    # what a kill after two steps leaves
    short = settings(tmp_path / "cut", *start, "train.steps=2")
    runs.align(short, progress=False)
    runs.align(settings(tmp_path / "cut", *start), resume=True, progress=False)
    one, other = ((tmp_path / name / "weights" / LORA).read_bytes() for name in ("whole", "cut"))
    assert one == other


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["trainable.start={lora}", "trainable.rank=2"], "take the rank, targets and model"),
        (["trainable.start={lora}", "trainable.alpha=8"], "set trainable.rank=4 and trainable.alpha=4"),
        (["trainable.start={lora}", "trainable.targets=[to_q]"], "take the rank, targets and model"),
        (["trainable.start={lora}", "trainable.kind=full"], "holds a LoRA"),
        (["trainable.start={full}", "trainable.kind=none", "users.names=[ann]"], "nothing of it; set trainable.start=null"),
        (["trainable.start={lora}", "reference.kind=start", "reference.bank=2"], "reference.bank=null"),
        (["trainable.start={folder}"], "holds no LoRA"),
        (["reference.kind=start"], "name a run there"),
    ],
)
def test_what_cannot_be_started_from_is_refused(
    first: Callable[[str], Path], prepared: Callable[..., Prepared], tmp_path: Path, overrides: list[str], part: str
) -> None:
    places = {"lora": first("lora"), "full": first("full"), "folder": tmp_path}
    with pytest.raises(ConfigError, match=part.replace(".", r"\.")):
        prepared(*(override.format(**places) for override in overrides))


def test_the_plan_knows_where_training_begins(first: Callable[[str], Path], settings: Make, tmp_path: Path) -> None:
    def reference(*overrides: str) -> tuple[int, str]:
        found: dict[str, Any] = runs.plan(settings(tmp_path, *overrides))
        (part,) = (part for part in found["memory"]["parts"] if part["name"] == "reference")
        return part["bytes"], part["how"]

    start, adapters = f"trainable.start={first('lora')}", load_file(first("lora") / "weights" / LORA)
    size = sum(tensor.nbytes for tensor in adapters.values())
    assert reference(start) == (0, "shared: the policy with its adapters off")
    assert reference(start, "reference.kind=start") == (size, "the adapters of trainable.start")
    with pytest.raises(ConfigError, match="take the rank"):
        reference(start, "trainable.rank=2")


def test_a_state_of_another_start_is_refused(first: Callable[[str], Path], settings: Make, tmp_path: Path) -> None:
    runs.align(settings(tmp_path / "run", f"trainable.start={first('lora')}", "train.steps=1"), progress=False)
    about = json.loads(next((tmp_path / "run" / "state").glob("step-*/about.json")).read_text())
    assert about["start"]
    with pytest.raises(Exception, match="start was"):
        runs.align(settings(tmp_path / "run"), resume=True, progress=False)
