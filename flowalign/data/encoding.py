"""Cache entries as they are made: distinct pictures and prompts collected, encoded so many at a time, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowalign.data.batch import Conditioning
from flowalign.data.cache import LatentCache
from flowalign.errors import NonFiniteError


class Encoder(Protocol):
    """The part of a Family that filling needs."""

    multiple: int

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, H, W]` in [0, 1] -> (mean, std), each `[B, C, h, w]`."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning `[B, ...]`, padded to a length that does not depend on the other prompts."""


class Fitted(NamedTuple):
    """A picture ready to be encoded."""

    pixels: np.ndarray
    """uint8 `[3, H, W]`"""
    geometry: tuple[int, ...]
    """see `images.geometry`"""
    attached: Mapping[str, Tensor]
    """see `Attached.tensors`"""


class Batches:
    """Collects distinct entries and hands them on `size` at a time, the last ones padded to `size`."""

    def __init__(self, size: int, encode: Callable[[list[Path], list[Any]], None], written: Callable[[Path], None]) -> None:
        self._size, self._encode, self._written = size, encode, written
        self._pending: dict[Path, Any] = {}

    def add(self, path: Path, item: Any) -> None:
        if path in self._pending or path.exists():  # it may have been encoded since the reading thread looked
            return
        self._pending[path] = item
        if len(self._pending) == self._size:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            paths, items = list(self._pending), list(self._pending.values())
            self._encode(paths, items + items[-1:] * (self._size - len(items)))
            self._pending.clear()
            self._written(paths[0])


@torch.no_grad()
def encode_images(cache: LatentCache, family: Encoder, paths: list[Path], pictures: list[Fitted]) -> None:
    mean, std = family.encode_images(torch.from_numpy(np.stack([picture.pixels for picture in pictures])).float() / 255)
    mean, std = mean.float().cpu(), std.float().cpu()
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise NonFiniteError(
            "the picture encoder gives NaN or infinity; run it in float32, or use a VAE made for half precision"
        )
    for row, path in enumerate(paths):
        cache.write_image(path, mean[row], std[row], pictures[row].geometry, pictures[row].attached)


@torch.no_grad()
def encode_prompts(cache: LatentCache, family: Encoder, paths: list[Path], prompts: list[str]) -> None:
    tensors = {name: tensor.cpu() for name, tensor in family.encode_prompts(prompts).tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise NonFiniteError("the prompt encoder gives NaN or infinity; run it in float32 or bfloat16")
    for row, path in enumerate(paths):
        cache.write_prompt(path, {name: tensor[row] for name, tensor in tensors.items()})


@torch.no_grad()
def latent_shape(cache: LatentCache, family: Encoder) -> tuple[int, ...]:
    """`(C, h, w)` of a picture's latents."""
    mean, _ = family.encode_images(torch.zeros(1, 3, cache.resolution, cache.resolution))
    return tuple(mean.shape[1:])
