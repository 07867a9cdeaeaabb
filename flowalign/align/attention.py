"""The context of a forward pass: autocast, and on a CPU attention kernels whose backward pass is not slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class FloatAttention(TorchFunctionMode):
    """Attention of bfloat16 tensors in float32, back in bfloat16 after it.

    A CPU's bfloat16 attention is as fast forwards, and several times slower backwards (docs/performance.md).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        dtype = (args[0] if args else kwargs["query"]).dtype
        if torch.is_autocast_enabled("cpu"):  # would round inputs of float32 as well
            dtype = torch.get_autocast_dtype("cpu")
        if dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))

        def wide(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

        with torch.autocast("cpu", enabled=False):
            out = func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})
        return out.to(dtype)


def forwards(
    autocast: Callable[[], AbstractContextManager[None]], device: torch.device, *, kernels: bool
) -> Callable[[], AbstractContextManager[None]]:
    """What a forward pass runs in: `autocast` and, on a CPU and where `kernels` may be exchanged, `FloatAttention`."""
    if device.type != "cpu" or not kernels:
        return autocast

    @contextmanager
    def context() -> Iterator[None]:
        with autocast(), FloatAttention():
            yield

    return context
