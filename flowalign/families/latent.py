"""What families over the latents of an autoencoder have in common: loading, encoding, fingerprints, pipelines."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from flowalign.data.batch import Conditioning
from flowalign.errors import CheckpointError
from flowalign.families.base import Canvas, Family, Level, Posterior
from flowalign.families.loading import INDEX, Located, digest, load_parts, locate
from flowalign.families.noise import FlowNoise, Noise
from flowalign.families.outline import outline_parts

Parts = Callable[[Located, type, Sequence[str], torch.dtype], dict[str, Any]]
"""Gives the named parts of a pipeline: with their weights, or as an outline."""


def padded(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Token states `[l, D]` of several prompts -> `[B, length, D]`, zeros after each, and which are real, `[B, length]`."""
    cut = [row[:length] for row in rows]
    states = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in cut])
    real = torch.tensor([[place < len(row) for place in range(length)] for row in cut], device=states.device)
    return states, real


def compute_dtype(denoiser: nn.Module) -> torch.dtype:
    """Of its first layer, which is no adapter; quantised weights are integers, and their layer's bias says what they were."""
    return next(parameter.dtype for parameter in denoiser.parameters() if parameter.is_floating_point())


class LatentFamily(Family):
    """A denoiser, an AutoencoderKL and text encoders, held together by one diffusers pipeline class."""

    text_parts: ClassVar[tuple[str, ...]]
    """The pipeline's text encoders and tokenizers; a checkpoint may lack some."""
    vae_class: ClassVar[str] = "AutoencoderKL"
    patch: ClassVar[int] = 1
    """The denoiser reads latents in squares of this side."""
    noise: Noise

    def __init__(self, located: Located, dtype: torch.dtype, parts: Parts = load_parts) -> None:
        self.located, self.dtype, self._parts = located, dtype, parts
        index = located.settings(INDEX)
        self._texts = tuple(name for name in self.text_parts if (index.get(name) or [None])[0])
        self._kind: Any = getattr(diffusers, located.pipeline_class)
        self._values = {
            name: value for name, value in index.items() if not isinstance(value, list) and not name.startswith("_")
        }
        loaded = self._load(dtype, self.component, "scheduler")
        self.denoiser = loaded[self.component].requires_grad_(False).eval()
        self.noise = self.read_noise(loaded["scheduler"])
        self._schedule = dict(loaded["scheduler"].config)
        vae = located.settings("vae/config.json")
        if vae.get("_class_name") != self.vae_class:
            raise CheckpointError(
                f"{located.name} has a VAE of class {vae.get('_class_name')}; use one of class {self.vae_class}."
            )
        self._factor = self.factor(vae)
        self._encoders: dict[str, Any] = {}
        self._fingerprints: dict[str, str] = {}
        self.resolution = self.side(self.denoiser.config) * self._factor
        self.multiple = self._factor * self.patch

    @classmethod
    def load(
        cls, checkpoint: str | Path, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
    ) -> Self:
        """Load the denoiser, frozen, on the CPU; the encoders follow when they are asked for. Raises CheckpointError.

        A single file is described by the folder of the same name or the folder around it, if there is a
        `model_index.json`, else by the hub's settings for its kind, which for every 2.x file are those of 2.1 (v).
        """
        return cls(cls._own(locate(checkpoint, revision=revision, variant=variant)), dtype)

    @classmethod
    def outline(
        cls, checkpoint: str | Path, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
    ) -> Self:
        return cls(cls._own(locate(checkpoint, revision=revision, variant=variant, weights=False)), dtype, outline_parts)

    @classmethod
    def _own(cls, located: Located) -> Located:
        if located.pipeline_class not in cls.pipeline_classes:
            wanted = ", ".join(cls.pipeline_classes)
            raise CheckpointError(f"{located.name} is a {located.pipeline_class}, but the family {cls.name!r} takes {wanted}.")
        return located

    @abstractmethod
    def read_noise(self, scheduler: Any) -> Noise:
        """The noise that the checkpoint was trained with. Raises CheckpointError."""

    @abstractmethod
    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Prompts -> conditioning `[B, ...]` by the pipeline's own encoding."""

    @abstractmethod
    def embed_outline(self, texts: dict[str, Any], count: int) -> dict[str, Tensor]:
        """What `embed` gives for `count` prompts of full length, from outlines of the text encoders, None where one lacks."""

    @staticmethod
    def factor(vae: dict[str, Any]) -> int:
        """Pixels per latent, along a side, of a VAE with these settings."""
        return int(2 ** (len(vae["block_out_channels"]) - 1))

    @staticmethod
    def side(config: Any) -> int:
        """Side of the latents that a denoiser of this configuration was trained on."""
        size = config.sample_size
        return int(size if isinstance(size, int) else min(size))

    @classmethod
    def channels(cls, config: Any) -> int:
        """Channels of those latents."""
        return int(config.in_channels)

    @classmethod
    def canvas(cls, pipeline: Any) -> Canvas:
        config, factor = getattr(pipeline, cls.component).config, pipeline.vae_scale_factor
        return Canvas(cls.channels(config), factor, factor * cls.patch, cls.side(config) * factor)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Posterior:
        """Pixels `[B, 3, H, W]` in [0, 1] -> posterior `[B, C, H/f, W/f]`, float32, on the denoiser's device."""
        vae = self._vae()
        latents = vae.encode((pixels * 2 - 1).to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        return Posterior((latents.mean.float() - shift) * scale, latents.std.float() * scale)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning in the text encoders' dtype, cut to their lengths, as the pipeline does."""
        pipeline = self._text_pipeline()
        level = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()  # it would report every prompt that it cuts
        try:
            return Conditioning(self.embed(pipeline, list(prompts), self._device()))
        finally:
            diffusers_logging.set_verbosity(level)

    def outline_encoders(self) -> dict[str, nn.Module]:
        return {"vae": self._vae(), **self._load(self.dtype, *(n for n in self._texts if not n.startswith("tokenizer")))}

    @torch.no_grad()
    def outline_prompts(self, count: int) -> Conditioning:
        return Conditioning(self.embed_outline(dict.fromkeys(self.text_parts) | self.outline_encoders(), count))

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.noise.noisy(x0, noise, t)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.noise.scales(t, like)

    def implied(self, x: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return self.noise.implied(x, prediction, signal, sigma)

    def level(self, t: Tensor) -> Level:
        return self.noise.level(t)

    def shifted(self, t: Tensor, latents: tuple[int, int]) -> Tensor:
        return self.noise.shifted(t, latents[0] * latents[1] // self.patch**2)

    def pipeline(self, denoiser: nn.Module) -> Any:
        """A pipeline around `denoiser` with encoders of its own, in the denoiser's dtype and on its device."""
        parts = self._load(compute_dtype(denoiser), "vae", *self._texts, "scheduler")
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.to(next(denoiser.parameters()).device)
        return self._assemble(denoiser, parts)

    def fingerprint(self, part: str) -> str:
        """Hash of the weights and settings of "images", "prompts" or "denoiser" (its noise schedule with it), in their dtype.

        Remembered: ask for "denoiser" before training changes it in place.
        """
        if part not in self._fingerprints:
            if part == "images":
                hashed = [self._vae()]
            elif part == "prompts":
                hashed = [getattr(self._text_pipeline(), name) for name in self._texts]
            else:
                hashed = [self.denoiser, self._schedule]
            self._fingerprints[part] = digest(*hashed)
        return self._fingerprints[part]

    def release_encoders(self) -> None:
        self._encoders.clear()

    def cast(self, denoiser: nn.Module, x_t: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """To the denoiser's weights' dtype, unless autocast is on."""
        if not x_t.is_meta and torch.is_autocast_enabled(x_t.device.type):
            return x_t, *others
        dtype = compute_dtype(denoiser)
        return tuple(tensor.to(dtype) for tensor in (x_t, *others))

    def _device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def _load(self, dtype: torch.dtype, *parts: str) -> dict[str, Any]:
        return self._parts(self.located, self._kind, parts, dtype)

    def _assemble(self, denoiser: nn.Module, parts: dict[str, Any]) -> Any:
        """The pipeline of these parts, None for all others, with the plain values of the checkpoint's index."""
        given = {**self._values, "requires_safety_checker": False, self.component: denoiser, **parts}
        wanted = inspect.signature(self._kind.__init__).parameters
        missing = {n: None for n, p in wanted.items() if n != "self" and p.default is p.empty and n not in given}
        return self._kind(**missing, **{name: value for name, value in given.items() if name in wanted})

    def _vae(self) -> Any:
        if "vae" not in self._encoders:
            # Half precision overflows in some VAEs; their settings say so, and latents are encoded only once.
            exact = self.located.settings("vae/config.json").get("force_upcast", True)
            self._encoders |= self._load(torch.float32 if exact else self.dtype, "vae")
        return self._encoders["vae"].to(self._device())

    def _text_pipeline(self) -> Any:
        """The pipeline with its text encoders only, for its own way of encoding prompts, on the denoiser's device."""
        if "texts" not in self._encoders:
            self._encoders["texts"] = self._assemble(self.denoiser, self._load(self.dtype, *self._texts))
        pipeline = self._encoders["texts"]
        for name in self._texts:
            if isinstance(part := getattr(pipeline, name), nn.Module):
                part.to(self._device())
        return pipeline


class FlowFamily(LatentFamily):
    """A transformer over 2x2 squares of latents that predicts the velocity of a rectified flow."""

    component = "transformer"
    patch = 2
    timesteps = "shifted"

    def read_noise(self, scheduler: Any) -> FlowNoise:
        return FlowNoise(scheduler)

    @staticmethod
    def side(config: Any) -> int:
        return int(config.get("sample_size") or 128)  # most do not say; those were trained around 1024 px
