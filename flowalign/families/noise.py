"""How latents become noisy: the discrete schedules of ε-, v- and x0-models, and the straight line of flow matching."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from flowalign.errors import CheckpointError, allowed
from flowalign.families.base import Level

PREDICTIONS = ("epsilon", "v_prediction", "sample")
TINY = 1e-12


class Noise(ABC):
    """A path from latents to noise, with t in [0, 1]: 0 clean, 1 noise."""

    steps: int
    """T, the number that denoisers count times up to."""

    @abstractmethod
    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise `[B, ...]`, t `[B]` -> (x_t, the denoiser's regression target), both float32 `[B, ...]`."""

    @abstractmethod
    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of x_t = a x0 + b ε at t `[B]`: each `[B, 1, ...]`, float32, with the dimensions and device of `like`."""

    @abstractmethod
    def implied(self, x: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """The ε of x = signal·x0 + sigma·ε that a prediction at x implies."""

    @abstractmethod
    def timesteps(self, t: Tensor) -> Tensor:
        """t `[B]` -> the times that the denoiser is told, `[B]`."""

    @abstractmethod
    def level(self, t: Tensor) -> Level:
        """How noisy pictures are at times t `[B]`."""

    def shifted(self, t: Tensor, tokens: int) -> Tensor:
        """Even times `[B]` in [0, 1] -> as the scheduler spaces them for pictures of so many tokens."""
        return t


class DiscreteNoise(Noise):
    """The schedule and prediction type of a diffusers scheduler over T discrete times."""

    def __init__(self, name: str, scheduler: Any) -> None:
        """name: the checkpoint's, for messages. Raises CheckpointError for a schedule that is none of DDPM's."""
        if "sigma_data" in scheduler.config:
            raise CheckpointError(
                f"{name} has a {type(scheduler).__name__}, whose noise levels have no discrete times; use a checkpoint with "
                "the schedule of DDPM."
            )
        schedule = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type: str = schedule.config.prediction_type
        """What the denoiser predicts: epsilon, v_prediction or sample."""
        if self.prediction_type not in PREDICTIONS:
            raise CheckpointError(
                f"{name} predicts {self.prediction_type!r}; {allowed(self.prediction_type, PREDICTIONS)}, "
                "to be set as prediction_type in scheduler/scheduler_config.json."
            )
        self.steps = schedule.config.num_train_timesteps
        self.alphas_cumprod: Tensor = schedule.alphas_cumprod
        """ᾱ `[T]`, float32."""
        self._scales: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def timesteps(self, t: Tensor) -> Tensor:
        """t `[B]` in [0, 1] -> min(⌊t·T⌋, T−1), int64."""
        return (t * self.steps).long().clamp_(0, self.steps - 1)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t = √ᾱ x0 + √(1−ᾱ) ε (Ho et al. 2020, 2006.11239, eq. 4) and the target, both float32 `[B, C, h, w]`.

        The target is ε, or x0, or v = √ᾱ ε − √(1−ᾱ) x0 (Salimans & Ho 2022, 2202.00512).
        """
        signal, sigma = self.scales(t, x0)
        x0, noise = x0.float(), noise.float()
        x_t = signal * x0 + sigma * noise
        if self.prediction_type == "epsilon":
            return x_t, noise
        if self.prediction_type == "sample":
            return x_t, x0
        return x_t, signal * noise - sigma * x0

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1−ᾱ)."""
        if like.device not in self._scales:
            self._scales[like.device] = (
                (self.alphas_cumprod**0.5).to(like.device),
                ((1 - self.alphas_cumprod) ** 0.5).to(like.device),
            )
        steps = self.timesteps(t).to(like.device)
        signal, sigma = (_per_row(scale[steps], like) for scale in self._scales[like.device])
        return signal, sigma

    def implied(self, x: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """Not finite where the model predicts x0 and there is no noise in x, about which it then says nothing."""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return (x - signal * prediction) / sigma
        return signal * prediction + sigma * x

    def level(self, t: Tensor) -> Level:
        signal = self.alphas_cumprod[self.timesteps(t.cpu())].double().clamp(TINY, 1 - TINY)
        to_x0 = {"epsilon": (1 - signal) / signal, "v_prediction": 1 - signal, "sample": torch.ones_like(signal)}
        return Level((signal / (1 - signal)).log().float(), to_x0[self.prediction_type].float())


class FlowNoise(Noise):
    """The straight line of rectified flow: x_t = (1−t) x0 + t ε, whose velocity is ε − x0 (Liu et al. 2022, 2209.03003).

    t is the noise level σ itself. How a scheduler spaces its σ decides which are drawn, not what they mean.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        self.steps = config.num_train_timesteps
        self._shift: float = config.shift
        self._dynamic: bool = bool(config.get("use_dynamic_shifting"))
        self._exponential = config.get("time_shift_type", "exponential") == "exponential"
        low, high = config.get("base_image_seq_len") or 256, config.get("max_image_seq_len") or 4096
        least, most = config.get("base_shift") or 0.5, config.get("max_shift") or 1.15
        self._slope = (most - least) / (high - low)
        self._offset = least - self._slope * low
        self._terminal: float = config.get("shift_terminal") or 0.0

    def timesteps(self, t: Tensor) -> Tensor:
        """t `[B]` in [0, 1] -> t·T, float32: continuous, as the flow schedulers of diffusers have it."""
        return t.float() * self.steps

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0, noise = x0.float(), noise.float()
        signal, sigma = self.scales(t, x0)
        return signal * x0 + sigma * noise, noise - x0

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        level = _per_row(t.to(like.device, torch.float32), like)
        return 1 - level, level

    def implied(self, x: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """x + (1−t) v."""
        return x + signal * prediction

    def level(self, t: Tensor) -> Level:
        """SNR = (1−t)² / t², and x0 = x_t − t v."""
        level = t.cpu().double().clamp(TINY, 1 - TINY)
        return Level(2 * ((1 - level) / level).log().float(), level.square().float())

    def shifted(self, t: Tensor, tokens: int) -> Tensor:
        """t' = s t / (1 + (s−1) t): more noise for larger pictures (Esser et al. 2024, 2403.03206, eq. 23).

        s is the scheduler's `shift`; where it shifts dynamically, exp(μ) with μ linear in the number of tokens, as the
        pipelines of FLUX.1 and its successors compute it, or μ itself where the scheduler's type is linear.

        A scheduler with `shift_terminal` τ stretches its levels so that the last before the picture is τ, by a factor that
        depends on how many there are. Here it is the factor of ever more of them: t'' = 1 − (1−τ)(1−t').
        """
        shift = self._shift
        if self._dynamic:
            mu = self._offset + self._slope * tokens
            shift = math.exp(mu) if self._exponential else mu
        level = shift * t / (1 + (shift - 1) * t)
        return 1 - (1 - self._terminal) * (1 - level)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
