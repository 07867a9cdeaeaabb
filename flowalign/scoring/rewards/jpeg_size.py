"""JPEG size: how much there is to compress, in bits a pixel."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels

QUALITY = 95


def jpeg_size(picture: Tensor) -> Tensor:
    """Bits a pixel of the picture as a JPEG of quality 95 without subsampling; `[3, H, W]` in [0, 1] -> a number above 0.

    The reward of Black et al. 2023, 2305.13301 (incompressibility), a pixel instead of a file, so that sizes can be compared.
    """
    levels = (picture.detach() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(levels)).save(out, "JPEG", quality=QUALITY, subsampling=0)
    return torch.tensor(8 * out.tell() / (levels.shape[0] * levels.shape[1]), dtype=torch.float32, device=picture.device)


def load(shelf: Shelf) -> Reward:
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
        fingerprint="jpeg_size-1",
    )
    return Formula(card, Pixels.of(shelf), jpeg_size)


REWARD = load
