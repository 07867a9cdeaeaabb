"""A picture that others are compared with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from flowalign.data.images import decode
from flowalign.errors import DataError
from flowalign.scoring.rewards.pixels import Pixels


@dataclass(frozen=True)
class Reference:
    """One picture."""

    pixels: Tensor = field(repr=False)
    """`[3, H, W]` in [0, 1]"""
    name: str
    fingerprint: str

    def like(self, pictures: Tensor) -> Tensor:
        """`[1, 3, H, W]` in the size of these; resized where it differs, bicubic with antialiasing."""
        size = pictures.shape[2:]
        if self.pixels.shape[1:] == size:
            return self.pixels[None]
        resized = F.interpolate(self.pixels[None], tuple(size), mode="bicubic", align_corners=False, antialias=True)
        return resized.clamp(0, 1)


def read_reference(file: str, backbone: Pixels) -> Reference:
    """Raises DataError for a file that is not there or is no picture."""
    path = Path(file).expanduser()
    try:
        picture = decode(path.read_bytes())
    except (OSError, DataError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{path} cannot be read as the reference picture ({said}); give reference: a picture's file."
        ) from error
    inputs = backbone.prepare(picture)
    digest = hashlib.sha256(inputs.numpy().tobytes() + bytes(str(tuple(inputs.shape)), "ascii")).hexdigest()[:16]
    return Reference(backbone.see([inputs])[0], path.name, digest)
