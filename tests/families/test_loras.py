"""A run's LoRA in a pipeline that has others: both are applied, and it leaves without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from flowalign import personal, steered, unsteered
from flowalign.errors import CheckpointError
from flowalign.families.loading import LORA, open_checkpoint
from flowalign.families.sd import StableDiffusion
from tests.families import test_personal, test_steer
from tests.families.test_every_family import plainly

Put = Callable[[Any], Any]
STRENGTH = {"mine": 0.5}


def written(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA of the tiny checkpoint that changes what it says."""
    pipeline = plainly(base)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    pipeline.unet.save_lora_adapter(folder, weight_name=LORA)
    save_file({f"unet.{name}": tensor for name, tensor in load_file(folder / LORA).items()}, folder / LORA)
    return folder / LORA


@pytest.fixture(params=["steered", "personal"])
def put(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Put:
    """Puts a run with a LoRA into a pipeline; what it tells beside that says nothing."""
    if request.param == "steered":
        run = test_steer.saved(tmp_path / "run", test_steer.STEERED, test_steer.a_shift(32, 0.0))
        call: Put = lambda pipeline: steered(pipeline, run, {"clip": 1})  # noqa: E731
    else:
        family = StableDiffusion.load(folders["epsilon"], dtype=torch.float32)
        run = test_personal.saved(tmp_path / "run", test_personal.some_users(family, fresh=True))
        call = lambda pipeline: personal(pipeline, run, "ann")  # noqa: E731
    written(run / "weights", folders["epsilon"], 1)
    (run / "config.yaml").write_text(f"model: {{checkpoint: {folders['epsilon']}}}\n")
    return call


@pytest.fixture
def mine(folders: dict[str, Path], tmp_path: Path) -> Path:
    return written(tmp_path / "mine", folders["epsilon"], 2)


@pytest.fixture
def pipeline(folders: dict[str, Path]) -> Any:
    return plainly(folders["epsilon"])


def add(pipeline: Any, file: Path, name: str) -> None:
    pipeline.unet.load_lora_adapter(file.parent, prefix="unet", weight_name=LORA, adapter_name=name)


def says(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 16, 32, generator=generator)
    if getattr(pipeline, "_flowalign_steering", None) is not None and hasattr(pipeline._flowalign_steering, "users"):
        states = torch.cat([states, states.new_zeros(1, 3, 32)], dim=1)  # where a user's tokens travel
    with torch.no_grad():
        return torch.as_tensor(pipeline.unet(x, 300, states).sample)


def applied(pipeline: Any) -> list[str]:
    found = pipeline.unet.active_adapters()
    return [found] if isinstance(found, str) else list(found)


def both(folders: dict[str, Path], run: Path, mine: Path) -> torch.Tensor:
    """What two adapters say together, by diffusers alone."""
    pipeline = plainly(folders["epsilon"])
    add(pipeline, run / "weights" / LORA, "run")
    add(pipeline, mine, "mine")
    pipeline.unet.set_adapters(["run", "mine"], [1.0, STRENGTH["mine"]])
    return says(pipeline)


def test_a_lora_that_was_there_first_stays_and_the_runs_is_applied_beside_it(
    folders: dict[str, Path], pipeline: Any, put: Put, mine: Path, tmp_path: Path
) -> None:
    add(pipeline, mine, "mine")
    pipeline.unet.set_adapters(["mine"], [STRENGTH["mine"]])
    alone = says(pipeline)
    for _ in range(2):  # for somebody else, or under other weights
        put(pipeline)
        assert len(pipeline.unet.peft_config) == 2
        assert applied(pipeline) == list(pipeline.unet.peft_config)
        torch.testing.assert_close(says(pipeline), both(folders, tmp_path / "run", mine), rtol=0, atol=1e-5)
    unsteered(pipeline)
    assert list(pipeline.unet.peft_config) == applied(pipeline) == ["mine"]
    assert torch.equal(says(pipeline), alone)


def test_a_lora_that_came_later_stays_when_the_runs_leaves(pipeline: Any, put: Put, mine: Path) -> None:
    put(pipeline)
    add(pipeline, mine, "mine")
    assert applied(pipeline) == ["mine"]  # diffusers' own way
    alone = says(unsteered(pipeline))
    assert list(pipeline.unet.peft_config) == applied(pipeline) == ["mine"]
    put(pipeline)
    assert len(applied(pipeline)) == 2
    add(pipeline, mine, "another")
    pipeline.unet.set_adapter([name for name in pipeline.unet.peft_config if name not in ("mine", "another")])
    unsteered(pipeline)
    assert applied(pipeline) == []  # as it was left, and none in place of the run's
    pipeline.unet.set_adapter("mine")
    assert torch.equal(says(pipeline), alone)


def test_the_runs_own_lora_is_not_loaded_twice(pipeline: Any, put: Put, mine: Path, tmp_path: Path) -> None:
    for ours in (open_checkpoint(tmp_path / "run"), pipeline):
        if ours is pipeline:
            add(ours, tmp_path / "run" / "weights" / LORA, "by hand")
        before, names = says(ours), list(ours.unet.peft_config)
        put(ours)
        assert list(ours.unet.peft_config) == names
        torch.testing.assert_close(says(ours), before, rtol=0, atol=1e-5)
        add(ours, mine, "mine")
        put(ours)
        assert applied(ours) == ["mine", *names]
        unsteered(ours)
        assert [*names, "mine"] == list(ours.unet.peft_config)
        assert applied(ours) == ["mine"]


def test_what_was_taken_away_meanwhile_is_not_taken_twice(pipeline: Any, put: Put, mine: Path) -> None:
    put(pipeline)
    (own,) = pipeline.unet.peft_config
    pipeline.unload_lora_weights()
    add(pipeline, mine, own)
    unsteered(pipeline)
    assert applied(pipeline) == [own]


def test_a_pipeline_without_others_is_as_it_was_and_a_broken_file_is_one_sentence(
    pipeline: Any, put: Put, mine: Path, tmp_path: Path
) -> None:
    before, names = says(pipeline), [name for name, _ in pipeline.unet.named_modules()]
    put(pipeline)
    assert not torch.equal(says(pipeline), before)
    unsteered(pipeline)
    assert [name for name, _ in pipeline.unet.named_modules()] == names
    assert torch.equal(says(pipeline), before)
    (tmp_path / "run" / "weights" / LORA).write_bytes(b"0" * 64)
    add(pipeline, mine, "mine")
    with pytest.raises(CheckpointError, match="cannot be read"):
        put(pipeline)
