"""A quantised base: what it takes, how near it stays, and that adapters are trained, saved and resumed beside it."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flowalign import runs, setup
from flowalign.errors import ConfigError, MissingExtraError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.quantized import quantize
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]


def bytes_of(module: nn.Module) -> int:
    """Weights and their scales, without what is trained."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "lora_" not in name}
    return sum(tensor.nbytes for tensor in state.values())


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_any_step_the_loss_is_log_2_and_the_base_is_small_and_shared(prepared: Make, precision: str) -> None:
    plain, ready = prepared(f"train.precision={precision}"), prepared("model.quantize=nf4", f"train.precision={precision}")
    batch = ready.first_batch()
    assert ready.step.self_test(batch, Keyed(0)) == 0.0
    loss, _ = ready.step(batch, Keyed(0))
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)

    linear = [layer for layer in plain.family.denoiser.modules() if isinstance(layer, nn.Linear)]
    weights = sum(layer.weight.nbytes for layer in linear)
    assert len(linear) > 20
    saved = bytes_of(plain.family.denoiser) - bytes_of(ready.family.denoiser)
    bits = 32 if precision == "fp32" else 16
    # Scales are a byte per block of 64, and each layer has tables of 1.2 KB, which is much for layers as tiny as these.
    tables = 1300 * len(linear)
    assert saved + tables > weights * (1 - (4 + 8 / 64) / bits) > saved
    policy = {n.replace(".base_layer", ""): p.data_ptr() for n, p in ready.policy.named_parameters() if "lora_" not in n}
    assert policy == {name: p.data_ptr() for name, p in ready.step.reference.named_parameters()}
    scales = [
        [id(p.quant_state) for p in model.parameters() if hasattr(p, "quant_state")]
        for model in (ready.policy, ready.step.reference)
    ]
    assert scales[0] == scales[1] != []

    exact, near = plain.step.terms(batch, Keyed(0)), ready.step.terms(batch, Keyed(0))
    error = float((near.policy_error - exact.policy_error).detach().abs().max())
    assert 0 < error < 0.1
    assert plain.about["denoiser"] != ready.about["denoiser"]  # so a bank of the one is not the other's


@pytest.mark.usefixtures("bitsandbytes")
def test_gradients_reach_every_adapter_and_are_near_those_of_the_whole_base(prepared: Make) -> None:
    found = []
    for quantized in ("null", "nf4"):
        ready = prepared(f"model.quantize={quantized}", "trainable.gradient_checkpointing=true", "train.batch_size=6")
        ready.model.train()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trained(ready.policy).values():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        ready.step(ready.first_batch(), Keyed(0))[0].mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained(ready.policy).values())
        found.append(torch.cat([parameter.grad.flatten() for parameter in trained(ready.policy).values()]))
    likeness = torch.nn.functional.cosine_similarity(*found, dim=0)
    assert float(likeness) > 0.9


@pytest.mark.usefixtures("bitsandbytes")
def test_a_quantised_run_is_the_same_after_a_resume_and_leaves_a_plain_lora(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    common = ("model.quantize=nf4", "train.precision=bf16", "train.save_every=2", "reference.bank=1")
    runs.align(settings(tmp_path / "whole", *common), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=2"), progress=False)
    runs.align(settings(tmp_path / "parts", *common), resume=True, progress=False)
    one, other = (load_file(tmp_path / name / "weights" / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    drawn = runs.generate(str(tmp_path / "parts"), ["a thing"], out=tmp_path / "out", steps=1, device="cpu", progress=False)
    assert drawn["pictures"] == 1


def test_the_whole_base_never_lies_on_the_device(
    settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def note(denoiser: nn.Module, kind: str, device: torch.device, *, trainable: str) -> None:
        asked.append((device.type, next(denoiser.parameters()).device.type))
        denoiser.to("meta")  # or it would go to a device that may not be there
        monkeypatch.setattr(denoiser, "to", lambda where: asked.append(("moved", where.type)))

    monkeypatch.setattr(setup, "quantize", note)
    setup.load_family(settings(tmp_path, "model.quantize=nf4"), torch.device("cuda"))
    assert asked == [("cuda", "cpu"), ("moved", "cuda")]


def test_a_full_fine_tune_is_refused(prepared: Make) -> None:
    with pytest.raises(ConfigError, match=r"model.quantize is 'nf4', but trainable.kind 'full'.*trainable.kind=lora"):
        prepared("model.quantize=nf4", "trainable.kind=full")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def absent(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return own(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r"model.quantize=nf4 needs the package 'bitsandbytes'.*flowalign\[cuda\]"):
        quantize(nn.Linear(2, 2), "nf4", torch.device("cpu"), trainable="lora")
