"""`Pixels`: pictures as they are, for rewards that are formulas; decoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowalign.scoring.rewards.base import Backbone, Card, Reward, Shelf

KEY = "pixels"
LUMA = (0.299, 0.587, 0.114)
"""Of ITU-R BT.601, as JPEG and Pillow have it."""


class Pixels(Backbone):
    """Features are the pictures themselves: a list of `[3, H, W]` float32 in [0, 1], each of its own size."""

    def __init__(self, device: torch.device) -> None:
        self.key, self.device = KEY, device

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    def see(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        shipped = [each.to(self.device, non_blocking=True) for each in inputs]
        return [each.float() / 255 if each.dtype == torch.uint8 else each.float() for each in shipped]

    def prepare_pixels(self, pixels: Tensor) -> Sequence[Tensor]:
        return list(pixels)

    @staticmethod
    def of(shelf: Shelf) -> Pixels:
        """The shelf's own."""
        return shelf.take(KEY, lambda: Pixels(shelf.device))


@dataclass(frozen=True)
class Formula(Reward):
    """A reward that is a function of one picture `[3, H, W]` in [0, 1]."""

    card: Card
    backbone: Pixels
    function: Callable[[Tensor], Tensor]

    def judge(self, features: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.stack([self.function(picture) for picture in features])


def grey(picture: Tensor) -> Tensor:
    """`[3, H, W]` -> luma `[H, W]`."""
    return torch.einsum("c,chw->hw", picture.new_tensor(LUMA), picture)


def filtered(plane: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    """A plane `[H, W]` under a 3 × 3 kernel, of the same size; edges are repeated outward."""
    weight = plane.new_tensor(kernel)[None, None]
    return F.conv2d(F.pad(plane[None, None], (1, 1, 1, 1), mode="replicate"), weight)[0, 0]
