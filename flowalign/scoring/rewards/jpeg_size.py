"""JPEG size: how much there is to compress, in bits a pixel."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, features
from torch import Tensor

from flowalign.errors import ConfigError
from flowalign.scoring.rewards.base import Backbone, Card, Reward, Shelf

HIGHEST = 95
"""Above it libjpeg hardly compresses, as Pillow's manual says."""


class Encoded(Backbone):
    """Encodes pictures where they are decoded, in the workers; features are bits a pixel `[B]`."""

    def __init__(self, quality: int, device: torch.device) -> None:
        self.key, self.quality, self.device = _key(quality), quality, device

    def prepare(self, image: Image.Image) -> Tensor:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.quality, subsampling=0)
        return torch.tensor(8 * out.tell() / (image.width * image.height), dtype=torch.float32)

    def see(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.stack(tuple(inputs)).to(self.device)


@dataclass(frozen=True)
class JpegSize(Reward):
    """Bits a pixel of the picture as a JPEG of fixed quality without subsampling.

    The reward of Black et al. 2023, 2305.13301 (incompressibility), a pixel instead of a file, so that sizes can be compared:
    from about 100,000 pixels on, below which the file's head of 0.6 kB shows.
    """

    card: Card
    backbone: Encoded

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return features


def load(shelf: Shelf, *, quality: int = 95) -> JpegSize:
    """quality: of the JPEG, 1 to 95. Raises ConfigError for another."""
    if not 1 <= quality <= HIGHEST:
        raise ConfigError(f"quality is {quality}; it must be between 1 and {HIGHEST}.")
    codec = features.version("libjpeg_turbo") or features.version("jpg")  # another encoder writes another size
    card = Card(
        name="jpeg_size",
        title="detail: bits a pixel of its JPEG",
        range=(0.0, math.inf),
        better="higher",
        licence="formula",
        source="Black et al. 2023, arXiv 2305.13301 (incompressibility)",
        weights="none",
        reads_prompt=False,
        differentiable=False,
        fingerprint=f"jpeg_size-2-{quality}-{codec}",
    )
    return JpegSize(card, shelf.take(_key(quality), lambda: Encoded(quality, shelf.device)))


def _key(quality: int) -> str:
    return f"jpeg {quality}"


REWARD = load
