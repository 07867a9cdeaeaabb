"""How a picture of any size becomes what a tower looks at: resized, cut or padded, normalised; for pictures and for pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowalign.errors import RunError

DIFFERENTIABLE = ("bicubic", "bilinear")
"""Filters that exist for tensors too."""


@dataclass(frozen=True)
class Plan:
    """What to do to a picture of one size."""

    resize: tuple[int, int]
    """height, width"""
    pad: tuple[int, int, int, int]
    """left, right, top, bottom"""
    cut: tuple[int, int]
    """top, left"""


@dataclass(frozen=True)
class Framing:
    """A tower's preprocessing, as its publisher defines it."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["shortest", "squash", "longest"] = "shortest"
    """The shorter side fits and the rest is cut; both are stretched; the longer side fits and the rest is filled."""
    resample: str = "bicubic"
    """Name of one of Pillow's filters, in lower case."""
    centre: Literal["even", "floor"] = "even"
    """Where half a pixel goes when an odd surplus is cut: torchvision rounds to even, transformers rounds down."""
    fill: int = 0
    """Grey level of the filled parts, 0 to 255."""
    arithmetic: Literal["bytes", "floats"] = "bytes"
    """Whether resizing rounds to bytes, as Pillow does, or works on floats without clamping, as torchvision does on tensors."""

    def plan(self, height: int, width: int) -> Plan:
        """For a picture of that size."""
        if self.fit == "squash":
            return Plan((self.height, self.width), (0, 0, 0, 0), (0, 0))
        if self.fit == "shortest" and self.height == self.width:
            short = min(height, width)  # the longer side is rounded down, in torchvision and in transformers
            resized = tuple(self.height if side == short else int(self.height * side / short) for side in (height, width))
        elif self.fit == "shortest":
            ratio = min(height / self.height, width / self.width)
            resized = (round(height / ratio), round(width / ratio))
        else:
            ratio = max(height / self.height, width / self.width)
            resized = (max(1, round(height / ratio)), max(1, round(width / ratio)))
        missing = (max(0, self.height - resized[0]), max(0, self.width - resized[1]))
        pad = (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
        surplus = (max(0, resized[0] - self.height), max(0, resized[1] - self.width))
        top, left = (round(each / 2) if self.centre == "even" else each // 2 for each in surplus)
        return Plan((resized[0], resized[1]), pad, (top, left))

    def picture(self, image: Image.Image) -> Tensor:
        """RGB picture -> `[3, height, width]`: uint8, or float32 around [0, 1] where the arithmetic is of floats."""
        if self.arithmetic == "floats":
            return self.pixels(_tensor(image)[None].float().div(255))[0]
        plan = self.plan(image.height, image.width)
        if plan.resize != (image.height, image.width):
            image = image.resize(plan.resize[::-1], Image.Resampling[self.resample.upper()])
        if any(plan.pad):
            left, right, top, bottom = plan.pad
            canvas = Image.new("RGB", (image.width + left + right, image.height + top + bottom), (self.fill,) * 3)
            canvas.paste(image, (left, top))
            image = canvas
        top, left = plan.cut
        return _tensor(image.crop((left, top, left + self.width, top + self.height)))

    def pixels(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] -> `[B, 3, height, width]`, differentiable: Pillow's antialiased filters without rounding.

        Raises RunError for a filter that tensors do not have.
        """
        plan = self.plan(pixels.shape[2], pixels.shape[3])
        if plan.resize != tuple(pixels.shape[2:]):
            if self.resample not in DIFFERENTIABLE:
                raise RunError(
                    f"the filter {self.resample} of this model's preprocessing has no gradient; score pictures instead."
                )
            height, width = plan.resize
            # Pillow resizes along rows, clamps what overshoots, and goes on along columns (for some tall pictures it begins
            # with columns, which only shows where neighbours differ as much as noise does). torchvision does both at once.
            steps = [(pixels.shape[2], width), (height, width)] if self.arithmetic == "bytes" else [(height, width)]
            for size in steps:
                pixels = F.interpolate(pixels, size, mode=self.resample, align_corners=False, antialias=True)
                pixels = pixels.clamp(0, 1) if self.arithmetic == "bytes" else pixels
        if any(plan.pad):
            pixels = F.pad(pixels, plan.pad, value=self.fill / 255)
        top, left = plan.cut
        return pixels[:, :, top : top + self.height, left : left + self.width]

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels, `[3, 1, 1]` each, where the tower is."""
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        return mean, std


def normalised(inputs: Sequence[Tensor] | Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """B inputs of `Framing.picture` or `Framing.pixels` -> `[B, 3, height, width]` float32, as the tower was trained on."""
    x = inputs if isinstance(inputs, Tensor) else torch.stack(tuple(inputs))
    if mean.device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # only from there does a copy not wait
    x = x.to(mean.device, non_blocking=True)
    x = x.float().div(255) if x.dtype == torch.uint8 else x.float()
    return (x - mean) / std


def _tensor(image: Image.Image) -> Tensor:
    """uint8 `[3, H, W]`"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
