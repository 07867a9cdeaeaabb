"""Rewards that are formulas of pixels and prompts, which count what goes through them; and pictures to score."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowalign.scoring.rewards.base import Backbone, Card, Reward


class Means(Backbone):
    """Each picture's mean colour."""

    def __init__(self, key: str = "means") -> None:
        self.key, self.device = key, torch.device("cpu")
        self.seen: list[tuple[float, ...]] = []

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).float().mean((0, 1)) / 255

    def see(self, inputs: Sequence[Tensor]) -> Tensor:
        self.seen += [tuple(each.tolist()) for each in inputs]
        return torch.stack(list(inputs))


class Brightness(Reward):
    """Mean of all pixels; the prompt is not read."""

    def __init__(self, backbone: Backbone, name: str = "brightness") -> None:
        self.backbone = backbone
        self.card = card(name, reads_prompt=False)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return features.mean(1)


class Lettered(Reward):
    """Brightness plus how many letters the prompt has; fails for prompts with "fail" in them, is NaN for those with "nan"."""

    def __init__(self, backbone: Backbone, name: str = "lettered") -> None:
        self.backbone = backbone
        self.card = card(name, reads_prompt=True)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        if any("fail" in prompt for prompt in prompts):
            raise ValueError("the text tower tripped. It does")
        values = [float("nan") if "nan" in prompt else float(len(prompt)) for prompt in prompts]
        return features.mean(1) + torch.tensor(values)


def card(name: str, *, reads_prompt: bool, **more: Any) -> Card:
    about: dict[str, Any] = dict(title=name, range=(0.0, 1.0), better="higher", licence="none", source="this test")
    about |= dict(weights="none", fingerprint=f"{name}-1", differentiable=False)
    return Card(name=name, reads_prompt=reads_prompt, **about | more)


def picture(number: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A picture of one colour that no other number has."""
    seed = hashlib.sha256(str(number).encode()).digest()
    return Image.new("RGB", size, tuple(seed[:3]))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def folder_of(path: Path, count: int, prompt: str | None = "thing {}") -> Path:
    """A folder of pictures, each with its prompt beside it."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (path / f"{number:04d}.png").write_bytes(encoded(picture(number)))
        if prompt is not None:
            (path / f"{number:04d}.txt").write_text(prompt.format(number))
    return path
