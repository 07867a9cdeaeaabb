"""`Family`: all that flowalign knows of a kind of generator. A family knows nothing of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowalign.data.batch import Conditioning

CONTEXT = "prompt_embeds"
"""Name in a Conditioning, of every family, of the prompt's tokens `[B, L, D]`."""


class Posterior(NamedTuple):
    """A picture's latent distribution in the denoiser's scale: mean and standard deviation, each `[B, C, h, w]`."""

    mean: Tensor
    std: Tensor


class Level(NamedTuple):
    """How noisy pictures are at given times; both `[B]`, float32, on the CPU."""

    log_snr: Tensor
    """log of signal over noise, both squared; finite also where there is no signal."""
    to_x0: Tensor
    """What an error of the prediction is multiplied by to be the error of x0 that it implies."""


class Canvas(NamedTuple):
    """What a pipeline of a family draws on."""

    channels: int
    """of its latents"""
    factor: int
    """pixels per latent, along a side"""
    multiple: int
    """picture sides must be multiples of this"""
    native: int
    """side in pixels that the checkpoint was trained for"""


class Family(ABC):
    """One kind of generator: how it encodes, noises, predicts, and becomes a diffusers pipeline again."""

    name: str
    component: str
    """What pipelines call the denoiser: unet or transformer."""
    pipeline_classes: tuple[str, ...]
    """Names of the diffusers pipelines whose checkpoints belong to this family."""
    denoiser: nn.Module
    """The pretrained denoiser; frozen."""
    resolution: int
    """Side in pixels that the checkpoint was trained for."""
    multiple: int
    """Picture sides must be multiples of this."""
    lora_targets: tuple[str, ...]
    """Module names that LoRA adapts unless told otherwise."""
    idle: tuple[str, ...] = ()
    """Layers whose results the output never reads, by full names in which -1 is the last of a list; some may be missing. They
    are never trained: a parameter without a gradient stops data parallelism."""
    negative: str | None = None
    """Rows of a guided pipeline's call to its denoiser that are the negative prompts': the first half, or the last; None where
    it calls for them apart, or not at all."""
    attentions: tuple[str, ...] = ("attn",)
    """Last names of the denoiser's attentions in which pictures read the prompt."""
    context: str = "encoder_hidden_states"
    """What its `forward` calls the prompt's tokens."""
    timesteps: str = "stratified"
    """How training times are drawn unless told otherwise; a name in `align.timesteps.TIMESTEPS`."""

    @classmethod
    @abstractmethod
    def load(
        cls, checkpoint: str | Path, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
    ) -> Family:
        """Load from a diffusers folder, a single `.safetensors` file or a hub id. Raises CheckpointError."""

    @classmethod
    @abstractmethod
    def outline(
        cls, checkpoint: str | Path, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
    ) -> Family:
        """The same from its settings alone, on the meta device: all shapes, no weights. Raises CheckpointError.

        It can be run, on tensors of that device, to count what the real one would do. Prompts go in by `outline_prompts`.
        """

    @classmethod
    @abstractmethod
    def canvas(cls, pipeline: Any) -> Canvas:
        """What a pipeline of one of `pipeline_classes` draws on."""

    @classmethod
    def call(cls, guidance: float, count: int) -> dict[str, Any]:
        """How such a pipeline is asked for guidance of this scale over `count` prompts; 1 or less is none."""
        return {"guidance_scale": guidance}

    @classmethod
    def pack(cls, noise: Tensor) -> Tensor:
        """Starting noise `[B, C, h, w]` as such a pipeline takes it for its argument `latents`."""
        return noise

    @classmethod
    def unpack(cls, latents: Tensor, shape: tuple[int, int]) -> Tensor:
        """What `pack` did, undone, of latents with this height and width: `[B, C, h, w]`."""
        return latents

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Posterior:
        """Pixels `[B, 3, H, W]` in [0, 1] -> latent posterior `[B, C, h, w]`, float32."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning `[B, ...]`. The empty prompt is what guidance uses as its negative."""

    @abstractmethod
    def outline_encoders(self) -> dict[str, nn.Module]:
        """Of an outline: its picture and text encoders, by name, in the dtype they run in."""

    @abstractmethod
    def outline_prompts(self, count: int) -> Conditioning:
        """Of an outline: conditioning `[count, ...]` of prompts as long as they can be, its encoders run once on each."""

    @abstractmethod
    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Latents at time t `[B]` in [0, 1] (0 clean, 1 noise) -> (x_t, the denoiser's own regression target)."""

    @abstractmethod
    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of x_t = a x0 + b ε at times t `[B]` in [0, 1]: each `[B, 1, ...]`, float32, on the device of `like`."""

    @abstractmethod
    def implied(self, x: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """The ε of x = signal·x0 + sigma·ε that the denoiser's prediction at x implies, x0 being implied as well."""

    @abstractmethod
    def level(self, t: Tensor) -> Level:
        """How noisy pictures are at times t `[B]` in [0, 1]."""

    def shifted(self, t: Tensor, latents: tuple[int, int]) -> Tensor:
        """Even times `[B]` in [0, 1] -> as the checkpoint's scheduler spaces them for latents of this height and width."""
        return t

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction of that target, `[B, C, h, w]`.

        Besides what `encode_prompts` gave, `conditioning` holds one row per picture under `batch.GEOMETRY`.
        """

    @abstractmethod
    def pipeline(self, denoiser: nn.Module) -> Any:
        """A plain diffusers pipeline around `denoiser`."""

    @abstractmethod
    def fingerprint(self, part: str) -> str:
        """Hash of the weights and settings of `part`: "images" or "prompts" (the encoders), or "denoiser"."""

    @abstractmethod
    def release_encoders(self) -> None:
        """Drop the picture and text encoders from memory; `encode_*` and `pipeline` reload them when asked again."""
