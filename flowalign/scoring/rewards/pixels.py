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
PIXELS_AT_ONCE = 2**22
"""Pictures of one size are measured together up to this many pixels, which bounds memory; a larger one goes alone."""


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
    """A reward that is a function of pictures: of one size `[N, 3, H, W]` in [0, 1] -> `[N]`, each for itself."""

    card: Card
    backbone: Pixels
    function: Callable[[Tensor], Tensor]

    def judge(self, features: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        places: dict[torch.Size, list[int]] = {}
        for place, picture in enumerate(features):
            places.setdefault(picture.shape, []).append(place)
        found: dict[int, Tensor] = {}
        for (_, height, width), alike in places.items():
            step = max(1, PIXELS_AT_ONCE // (height * width))
            for start in range(0, len(alike), step):
                chunk = alike[start : start + step]
                scores = self.function(torch.stack([features[place] for place in chunk]))
                found |= dict(zip(chunk, scores.float().unbind(), strict=True))
        return torch.stack([found[place] for place in range(len(features))])


def grey(pictures: Tensor) -> Tensor:
    """`[N, 3, H, W]` -> luma `[N, H, W]`."""
    return torch.einsum("c,nchw->nhw", pictures.new_tensor(LUMA), pictures)


def filtered(planes: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    """Planes `[N, H, W]` under a 3 × 3 kernel, of the same size; edges are repeated outward."""
    weight = planes.new_tensor(kernel)[None, None]
    return F.conv2d(F.pad(planes[:, None], (1, 1, 1, 1), mode="replicate"), weight)[:, 0]
