"""Memory of the plan against what the real parts take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowalign.plan.memory import encoders, memory
from flowalign.plan.model import outline
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]


def planned(config: Config) -> dict[str, int]:
    return {part.name: part.bytes for part in memory(outline(config), config)}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize(
    ("trainable", "bank", "precision", "kind"),
    [
        ("lora", "null", "bf16", "auto"),
        ("lora", "null", "bf16", "ema"),
        ("full", "null", "fp32", "auto"),
        ("full", "null", "fp32", "refresh"),
        ("full", "1", "fp32", "auto"),
    ],
)
def test_weights_gradients_and_states_are_those_of_a_run(
    prepared: Make, trainable: str, bank: str, precision: str, kind: str
) -> None:
    ready = prepared(
        f"trainable.kind={trainable}",
        f"reference.bank={bank}",
        f"reference.kind={kind}",
        f"train.precision={precision}",
        "train.ema=0.99",
    )
    found = planned(ready.config)
    learns = list(trained(ready.policy).values())
    loss, _ = ready.step(ready.first_batch(), Keyed(0))
    loss.mean().backward()
    ready.optimizer.step()
    assert ready.ema is not None
    states = [value for state in ready.optimizer.state.values() for value in state.values() if value.ndim]
    policy = storages([*ready.policy.parameters(), *ready.policy.buffers()])
    reference = {} if ready.step.reference is None else storages(ready.step.reference.parameters())
    assert found["trained weights"] == sum(parameter.nbytes for parameter in learns)
    assert found["frozen weights"] + found["trained weights"] == sum(policy.values())
    assert found["reference"] == sum(size for place, size in reference.items() if place not in policy)
    assert (found["reference"] > 0) is ((trainable == "full" or kind == "ema") and bank == "null")
    assert found["gradients"] == sum(parameter.grad.nbytes for parameter in learns if parameter.grad is not None)
    assert found["optimizer"] == sum(state.nbytes for state in states)
    assert found["moving average"] == sum(average.nbytes for average in ready.ema.values())


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", ["auto", "copy", "ema"])
def test_a_quantised_base_is_planned_at_what_it_takes(prepared: Make, kind: str) -> None:
    """Weights, scales and the scales of scales, to the byte; adapters, which are linear layers too, stay what they are."""
    ready = prepared(f"reference.kind={kind}", "model.quantize=nf4", "train.precision=bf16")

    def real(*modules: nn.Module | None) -> dict[int, int]:
        taken: dict[int, int] = {}
        for module in modules:
            for tensor in () if module is None else (*module.parameters(), *module.buffers()):
                scales = getattr(tensor, "quant_state", None)
                beside = 0 if scales is None else scales.absmax.nbytes + scales.state2.absmax.nbytes
                taken[tensor.untyped_storage().data_ptr()] = tensor.nbytes + beside
        return taken

    learns = sum(parameter.nbytes for parameter in trained(ready.policy).values())
    policy, reference = real(ready.policy), real(ready.step.reference)
    found = planned(ready.config)
    assert found["frozen weights"] == sum(policy.values()) - learns
    assert found["reference"] == sum(size for place, size in reference.items() if place not in policy)
    assert (found["reference"] > 0) is (kind != "auto")


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_activations_are_what_autograd_keeps(prepared: Make, trainable: str) -> None:
    """On a CPU, whose attention keeps no scores either, up to the odd mask or index."""
    ready = prepared(f"trainable.kind={trainable}", "data.resolution=32")
    batch, kept = ready.first_batch(), {}
    weights = storages([*ready.policy.parameters(), *ready.policy.buffers()])
    ready.model.train()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = ready.step(batch, Keyed(0))
    assert loss.requires_grad
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    assert planned(ready.config)["activations"] == pytest.approx(real, rel=0.03)


def test_what_saves_memory_does(settings: Callable[..., Config], tmp_path: Path) -> None:
    plain = planned(settings(tmp_path, "trainable.kind=full"))
    saving = planned(settings(tmp_path, "trainable.kind=full", "trainable.gradient_checkpointing=true"))
    assert saving["activations"] < 0.7 * plain["activations"]
    assert saving["trained weights"] == plain["trained weights"]
    double = planned(settings(tmp_path, "trainable.kind=full", "train.batch_size=4"))
    assert double["activations"] == pytest.approx(2 * plain["activations"], rel=0.01)
    half = planned(settings(tmp_path, "trainable.kind=full", "train.precision=bf16"))
    assert half["activations"] == pytest.approx(plain["activations"] / 2, rel=0.1)
    assert half["autocast copies"] == plain["trained weights"] // 2
    small = planned(settings(tmp_path, "trainable.kind=full", "train.optimizer=adamw8bit"))
    assert plain["optimizer"] / 4 < small["optimizer"] < plain["optimizer"] / 2.5  # small tensors keep 32-bit states


def test_encoders_are_those_of_the_checkpoint(prepared: Make) -> None:
    ready = prepared("train.precision=bf16")
    found = encoders(outline(ready.config))
    real = ready.family.pipeline(ready.family.denoiser)
    assert {name: each["parameters"] for name, each in found.items()} == {
        name: sum(parameter.numel() for parameter in getattr(real, name).parameters()) for name in ("vae", "text_encoder")
    }
    assert found["vae"]["bytes"] == 4 * found["vae"]["parameters"]  # force_upcast
    assert found["text_encoder"]["bytes"] == 2 * found["text_encoder"]["parameters"]


def test_in_chunks_the_activations_are_those_of_one_chunk(settings: Callable[..., Config], tmp_path: Path) -> None:
    """Four pictures of eight comparisons of two: what two comparisons keep."""
    chunked = planned(settings(tmp_path, "train.batch_size=8", "train.backward=chunked", "train.chunk=4"))
    assert chunked["activations"] == planned(settings(tmp_path, "train.batch_size=2"))["activations"]
