"""Bytes on the device while a run trains, by part: weights and states counted, activations estimated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowalign.align.reference import MOVING
from flowalign.families.sampling import PRECISIONS
from flowalign.plan.model import Outline
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.train.quantized import outlined_bytes
from flowalign.train.trainable import trained

STATE_8BIT, SMALLEST_8BIT = 2 * (1 + 4 / 256), 4096
"""bitsandbytes: both moments take a byte per weight and a float per block of 256; tensors below 4096 weights stay 32-bit."""


@dataclass(frozen=True)
class Part:
    """One line of the plan."""

    name: str
    bytes: int
    how: str
    """Where the number comes from."""


def memory(outline: Outline, config: Config) -> list[Part]:
    """The parts that are on the device together while the run trains. Call it last: it casts the outline's weights."""
    learns = list(trained(outline.policy).values())
    ids = {id(parameter) for parameter in learns}
    rest = [t for t in (*outline.policy.parameters(), *outline.policy.buffers()) if id(t) not in ids]
    precision, count = config.train.precision, sum(parameter.numel() for parameter in learns)
    compute = PRECISIONS[precision]
    shared = {*ids, *map(id, rest)}
    reference = outline.step.reference
    held = (*reference.parameters(), *reference.buffers()) if outline.live and reference is not None else ()
    own = [tensor for tensor in held if id(tensor) not in shared]
    small = outlined_bytes([outline.policy, *([] if reference is None else [reference])])
    frozen = sorted({dtypes(each for each in rest if id(each) not in small), *([str(config.model.quantize)] if small else [])})
    # Where pictures go through in chunks, the activations of one chunk are there at a time.
    together = config.train.batch_size
    if outline.step.chunk is not None:
        together = min(together, -(-outline.step.chunk // outline.pictures))
    why = "none: its errors come from the bank" if config.reference.bank else "shared: the policy with its adapters off"
    if own:
        why = "what follows the policy" if config.reference.kind in MOVING else "a frozen copy"
        if config.reference.kind == "start" and config.trainable.kind == "lora":
            why = "the adapters of trainable.start"
        if config.reference.kind == "merged":
            why = f"what {len(config.reference.checkpoints)} models do not share with the policy"
    return [
        Part("frozen weights", size(rest, small), " and ".join(frozen)),
        Part("trained weights", size(learns), dtypes(learns)),
        Part("reference", size(own, small), why),
        Part("gradients", 4 * count, "float32"),
        Part("optimizer", _state(learns, config.train.optimizer), f"two moments of {config.train.optimizer}"),
        Part("moving average", 4 * count if config.train.ema else 0, "float32" if config.train.ema else "train.ema is null"),
        Part("autocast copies", 0 if compute == torch.float32 else compute.itemsize * count, f"trained weights in {precision}"),
        Part(
            "activations",
            activations(outline, together, compute),
            f"estimate: what autograd keeps of {together} comparisons in {precision}, attention fused",
        ),
    ]


def activations(outline: Outline, comparisons: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one micro-batch, for a policy cast to `dtype`, counted in its forward on meta.

    Left out: workspaces, tensors that live only for a moment, the block that gradient checkpointing runs again, and that
    autocast leaves some operations in float32.
    """
    nn.Module.to(outline.policy, dtype)
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {t.untyped_storage()._cdata for t in (*outline.policy.parameters(), *outline.policy.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, or its address could be another's later
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        loss, _ = replace(outline.banked, chunk=None)(outline.batch(comparisons), Keyed(0))
    return sum(storage.nbytes() for storage in kept.values()) if loss.requires_grad else 0


class _FusedAttention(TorchFunctionMode):
    """Attention as GPUs run it: of the scores only their row sums are kept. On meta torch would keep all of them."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in names[:3])
        mask = given.get("attn_mask")
        if mask is not None:
            mask = torch.empty(*query.shape[:-1], key.shape[-2], dtype=query.dtype, device=query.device)
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, mask, torch.is_grad_enabled(), 0.0, given.get("is_causal", False))[0]


def size(tensors: Iterable[Tensor], other: Mapping[int, int] | None = None) -> int:
    """Bytes of these tensors; other: of those, by `id`, that stand for something of another size."""
    known = other or {}
    return sum(known.get(id(tensor), tensor.nbytes) for tensor in tensors)


def dtypes(tensors: Iterable[Tensor]) -> str:
    """Their dtypes in words."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})) or "none"


def encoders(outline: Outline) -> dict[str, dict[str, int]]:
    """Parameters and bytes of each encoder, which is on the device beside the denoiser while the caches are filled."""
    modules: dict[str, nn.Module] = outline.family.outline_encoders()
    return {
        name: {"parameters": sum(p.numel() for p in module.parameters()), "bytes": size(module.parameters())}
        for name, module in modules.items()
    }


def _state(parameters: list[nn.Parameter], optimizer: str) -> int:
    if optimizer == "adamw":
        return sum(8 * parameter.numel() for parameter in parameters)
    return round(sum(p.numel() * (8 if p.numel() < SMALLEST_8BIT else STATE_8BIT) for p in parameters))
