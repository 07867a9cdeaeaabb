"""What a row attaches to its pictures: masks of where they count, and the noise they were drawn from; cached with latents."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from flowalign.data.images import decode, fit
from flowalign.data.records import Comparison
from flowalign.errors import DataError
from flowalign.rng import starting_noise

NPY = b"\x93NUMPY"
"""What a .npy file begins with."""


@dataclass(frozen=True)
class Attached:
    """What comes with one picture, as its row gives it."""

    mask: bytes | None = None
    """An encoded picture: white counts, black does not."""
    noise: bytes | int | None = None
    """A .npy or .safetensors file, or the seed of `rng.starting_noise`."""

    def digest(self, picture: bytes) -> bytes:
        """The sha256 of a picture -> that of the picture with what is attached to it, the same where nothing is."""
        for name, value in (("mask", self.mask), ("noise", self.noise)):
            if value is not None:
                data = value if isinstance(value, bytes) else f"seed {value}".encode()
                picture = hashlib.sha256(picture + name.encode() + hashlib.sha256(data).digest()).digest()
        return picture

    def tensors(self, picture: Image.Image, resolution: int, shape: tuple[int, ...], *, flip: bool) -> dict[str, Tensor]:
        """What is cached beside latents of `shape` `[C, h, w]`: `mask` `[h, w]` and `noise` `[C, h, w]`, float32, if any.

        Raises DataError where they do not fit the picture.
        """
        found = {}
        if self.mask is not None:
            found["mask"] = _weights(self.mask, picture, resolution, shape, flip)
        if self.noise is not None:
            found["noise"] = _noise(self.noise, picture, resolution, shape)
        return found


def attached_to(comparison: Comparison, place: int, wanted: Collection[str]) -> Attached:
    """Of picture `place`, what is wanted of "mask" and "noise". A row may lack a mask, but raises DataError without noise."""
    mask = comparison.mask[place].read() if "mask" in wanted and comparison.mask is not None else None
    if "noise" not in wanted:
        return Attached(mask)
    if comparison.noise is not None:
        return Attached(mask, comparison.noise[place].read())
    if comparison.seed is not None:
        return Attached(mask, comparison.seed[place])
    raise DataError(
        "it has neither noise nor a seed, on which switches.noise 'stored' trains; fill in the column noise or seed"
    )


def _weights(data: bytes, picture: Image.Image, resolution: int, shape: tuple[int, ...], flip: bool) -> Tensor:
    """A mask cut and mirrored like its picture, averaged over the pixels of each latent, and divided by its mean: `[h, w]`."""
    mask = decode(data).convert("L")
    (wide, high), (width, height) = mask.size, picture.size
    if abs(wide * height - high * width) > width + height:  # each side of a smaller mask may be rounded by a pixel
        raise DataError(f"its mask is {wide}x{high} and the picture {width}x{height}; both must have the same shape")
    cut = fit(mask.convert("RGB"), resolution, flip=flip, resample=Image.Resampling.BOX)[0]
    share = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(cut).double()[None] / 255, shape[-2:])[0]
    if not share.any():
        raise DataError("its mask is black where the picture is used, so that nothing counts; make white what shall count")
    return (share / share.mean()).float()


def _noise(source: bytes | int, picture: Image.Image, resolution: int, shape: tuple[int, ...]) -> Tensor:
    if isinstance(source, int):
        if not 0 <= source < 2**63:
            raise DataError(f"its seed is {source}; noise comes from seeds of 0 to 2**63 - 1")
        if picture.size != (resolution, resolution):
            raise DataError(
                f"it has {picture.width}x{picture.height} pixels and is used at {resolution}x{resolution}, so the noise of "
                "its seed does not fit its latents; set data.resolution to the size it was drawn at"
            )
        return starting_noise(source, shape)[0]
    try:
        if source.startswith(NPY):
            noise = torch.from_numpy(np.load(io.BytesIO(source), allow_pickle=False).astype(np.float32))
        else:
            tensors = load(source)
            noise = tensors["noise" if len(tensors) > 1 else next(iter(tensors))].float()
    except (SafetensorError, ValueError, TypeError, EOFError, KeyError, StopIteration):
        raise DataError("its noise is no .npy file and no .safetensors file with a tensor 'noise' or only one") from None
    noise = noise[0] if noise.ndim == 4 and len(noise) == 1 else noise
    if noise.shape != shape:
        raise DataError(f"its noise has the shape {tuple(noise.shape)} and its latents {tuple(shape)}; they must be the same")
    if not noise.isfinite().all():
        raise DataError("its noise holds NaN or infinity; write it again")
    return noise
