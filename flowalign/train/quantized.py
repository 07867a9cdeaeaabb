"""A frozen base in 4 bits: LoRA trains beside linear layers whose own weights take about a quarter of bfloat16's bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.errors import ConfigError, MissingExtraError

BLOCK, BLOCKS = 64, 256
"""Weights to a scale, and scales to a float32 that they are themselves held by."""


def quantize(denoiser: nn.Module, kind: str, device: torch.device, *, trainable: str) -> None:
    """Replace every linear layer of `denoiser` in place by one of bitsandbytes on `device`, one after the other.

    The whole weights may lie elsewhere, so that they need not fit into the memory of `device`. On the meta device there are no
    values to round: layers become `OutlinedLinear`, and bitsandbytes is not needed.

    kind: nf4, 4-bit normal floats in blocks of 64 whose scales are quantised too (Dettmers et al. 2023, 2305.14314, §3).
    Products are computed in the weights' former dtype; convolutions, norms and embeddings stay as they are. The reference is
    the same quantised model, so every margin still starts at 0.

    There is no 8-bit kind: that of bitsandbytes rounds the layers' inputs as well, and once the adapters have moved the
    policy's inputs are rounded otherwise than the reference's, which is noise in differences of errors.

    Raises ConfigError where all weights are to be trained, and MissingExtraError.
    """
    if trainable == "full":
        raise ConfigError(
            f"model.quantize is {kind!r}, but trainable.kind {trainable!r} trains the weights themselves, and quantised ones "
            "cannot move; set model.quantize=null or trainable.kind=lora."
        )
    layers = [(name, layer) for name, layer in denoiser.named_modules() if type(layer) is nn.Linear]
    if device.type == "meta":
        for name, layer in layers:
            denoiser.set_submodule(name, OutlinedLinear(layer))
        return
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "cuda", f"model.quantize={kind}") from error
    for name, layer in layers:
        weight, biased = layer.weight, layer.bias is not None
        small = Linear4bit(
            layer.in_features, layer.out_features, biased, compute_dtype=weight.dtype, quant_type=kind, device="meta"
        )
        small.weight = Params4bit(weight.data, requires_grad=False, quant_type=kind, module=small)
        small.bias = layer.bias
        # On some CPUs it would pack weights anew for inference, in place, under the feet of the module that shares them.
        small.support_avx512bf16_for_cpu = False
        small.register_forward_pre_hook(_autocast)
        small = small.to(device).train(layer.training)
        small.quant_state = None  # the weights carry the scales; a module made after this one would get a copy of these
        denoiser.set_submodule(name, small)


class OutlinedLinear(nn.Linear):
    """The outline of a layer whose weights would be quantised: it runs as the whole layer does, and knows its bytes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    @property
    def weight_bytes(self) -> int:
        """4 bits a weight and 1/8 bit of scales, those of a last block that is not full too; without tables of 1 KB."""
        count = self.weight.numel()
        scales = -(-count // BLOCK)
        return -(-count // 2) + scales + 4 * -(-scales // BLOCKS)


def outlined_bytes(models: Iterable[nn.Module]) -> dict[int, int]:
    """What the weights of quantised layers would take, by `id` of the tensor that stands for them in an outline."""
    layers = (layer for model in models for layer in model.modules() if isinstance(layer, OutlinedLinear))
    return {id(layer.weight): layer.weight_bytes for layer in layers}


def _autocast(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
    """What autocast does for a linear layer of torch and cannot do for this one: the output comes in the precision of it."""
    (x,) = inputs
    kind = x.device.type
    return (x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x,)
