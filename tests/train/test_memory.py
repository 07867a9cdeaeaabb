"""What lies in memory while training: no encoders, and as few denoisers as the reference allows."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from flowalign import runs
from flowalign.settings import Config
from flowalign.train.rundir import RunDir


def alive(*kinds: type[nn.Module]) -> list[nn.Module]:
    """Modules of these classes that exist in this process; garbage that waits to be collected counts, as it takes memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some lazy modules warn when they are looked at
        return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


def held(denoisers: list[nn.Module]) -> int:
    """Elements of all their parameters, shared ones once."""
    return sum({p.data_ptr(): p.numel() for denoiser in denoisers for p in denoiser.parameters()}.values())


@pytest.mark.parametrize(
    ("overrides", "times"),
    [
        (("trainable.kind=full",), 2),
        (("trainable.kind=full", "reference.bank=1"), 1),
        (("trainable.kind=lora",), 1),
        (("trainable.kind=lora", "reference.kind=copy"), 2),
    ],
)
def test_while_training_there_are_no_encoders_and_few_denoisers(
    settings: Callable[..., Config],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    times: int,
) -> None:
    """Pictures are drawn between the steps, for which the encoders come and go."""
    one = sum(parameter.numel() for parameter in UNet2DConditionModel.from_pretrained(folders["epsilon"] / "unet").parameters())
    gc.collect()
    before = alive(AutoencoderKL, CLIPTextModel, UNet2DConditionModel)  # kept, so that none of these is taken for a new one
    record, seen = RunDir.record, []

    def looking(self: RunDir, step: int, values: dict[str, float]) -> None:
        record(self, step, values)
        new = [
            module
            for module in alive(AutoencoderKL, CLIPTextModel, UNet2DConditionModel)
            if all(m is not module for m in before)
        ]
        denoisers = [module for module in new if isinstance(module, UNet2DConditionModel)]
        seen.append((len(new) - len(denoisers), held(denoisers)))

    monkeypatch.setattr(RunDir, "record", looking)
    runs.align(settings(tmp_path / "run", "train.sample_every=1", "train.steps=3", *overrides), progress=False)
    assert len(seen) == 2 + 3
    assert {encoders for encoders, _ in seen} == {0}
    adapters = 0.1 * one if "trainable.kind=lora" in overrides else 0
    assert all(times * one <= elements <= times * one + adapters for _, elements in seen)
