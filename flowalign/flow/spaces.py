"""Spaces that flows move pictures in: their pixels, or the latents of any diffusers autoencoder.

Whatever the space, a picture is changed by what its change decodes to: picture + D(z₁) − D(z₀). Detail that an autoencoder
cannot hold is therefore kept, and a picture that is not moved comes back bit for bit.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from flowalign.errors import CheckpointError, reason
from flowalign.families.loading import FAILURES, digest, locate


class Space(ABC):
    """Pixels `[B, 3, H, W]` in [0, 1] <-> places z `[B, C, h, w]`."""

    name: str
    channels: int
    """C"""
    factor: int
    """Pixels per place, along a side."""
    resolution: int | None
    """Side of the pictures that it is made for; None where it does not say."""
    fingerprint: str
    """Changes whenever places could."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Places of pictures whose sides are multiples of `factor`, float32, on the space's device."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Pixels of places, float32; they may leave [0, 1]."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Space:
        """Moved there, in place."""

    def residual(self, start: Tensor, end: Tensor) -> Tensor:
        """D(z₁) − D(z₀) `[B, 3, H, W]`: what to add to the pictures that z₀ was encoded from; exactly 0 where nothing moved."""
        return self.decode(end) - self.decode(start)


class PixelSpace(Space):
    """Pixels scaled to [-1, 1]; for small pictures."""

    name, channels, factor, resolution = "pixels", 3, 1, None
    fingerprint = "pixels-1"

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.float() * 2 - 1

    def decode(self, z: Tensor) -> Tensor:
        return (z + 1) / 2

    def to(self, device: torch.device | str) -> PixelSpace:
        return self


class LatentSpace(Space):
    """Means of an autoencoder's latents in the scale that denoisers see: (z − shift) · scale."""

    name = "latents"

    def __init__(self, autoencoder: nn.Module, source: str) -> None:
        """source: what the user calls it. Raises CheckpointError for one that makes no latents `[B, C, h, w]` of pictures."""
        self.vae: Any = autoencoder.requires_grad_(False).eval()
        config = self.vae.config
        self._scale, self._shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
        try:
            side = 64
            probe = self.encode(torch.zeros(1, 3, side, side))
            self.channels, self.factor = probe.shape[1], side // probe.shape[2]
        except FAILURES as error:
            raise CheckpointError(
                f"the autoencoder of {source} is a {type(autoencoder).__name__}, which does not make latents of plain pictures "
                f"({reason(error)}); use one such as AutoencoderKL or AutoencoderTiny."
            ) from error
        size = config.get("sample_size")
        self.resolution = int(size) if isinstance(size, int) and size % self.factor == 0 else None
        self.fingerprint = f"latent-means-{digest(self.vae)}"

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        parameter = next(self.vae.parameters())
        found = self.vae.encode((pixels * 2 - 1).to(parameter.device, parameter.dtype))
        if hasattr(found, "latent_dist"):
            z = found.latent_dist.mean
        else:
            z = found.latents if hasattr(found, "latents") else found.latent
        if z.dim() != 4:
            raise ValueError(f"latents of shape {list(z.shape)}")
        return (z.float() - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        parameter = next(self.vae.parameters())
        latents = (z / self._scale + self._shift).to(parameter.device, parameter.dtype)
        return (self.vae.decode(latents).sample.float() + 1) / 2

    def to(self, device: torch.device | str) -> LatentSpace:
        self.vae.to(device)
        return self


def open_autoencoder(source: str, *, revision: str | None = None, variant: str | None = None) -> nn.Module:
    """The autoencoder of a checkpoint, or one that lies in a folder of its own, float32. Raises CheckpointError."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        raise CheckpointError(f"{source} is a single file; give a folder that a diffusers pipeline or autoencoder wrote.")
    folder = path if (path / "config.json").is_file() else locate(source, revision=revision, variant=variant).folder / "vae"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        return getattr(diffusers, kind).from_pretrained(
            folder, torch_dtype=torch.float32, variant=variant, use_safetensors=True
        )
    except FAILURES as error:
        raise CheckpointError(
            f"{source} has no autoencoder that can be loaded ({reason(error)}); give the folder of a diffusers autoencoder "
            "with weights as .safetensors."
        ) from error
