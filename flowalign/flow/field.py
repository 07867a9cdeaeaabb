"""The field v_θ(s, y, c) of a preference flow: a plain network for vectors, a U-Net for pictures and latents.

A folder with `field.json` and `field.safetensors` is all that it takes to have one again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowalign.errors import CheckpointError, ConfigError, reason
from flowalign.files import atomic, write_text

SETTINGS, WEIGHTS = "field.json", "field.safetensors"
TIMES = 1000
"""s in [0, 1] times this is what the sinusoids of the time embedding are made for."""


@dataclass(frozen=True)
class FieldSettings:
    """What a field is made from. Raises ConfigError."""

    shape: tuple[int, ...]
    """Of what it moves: `[D]`, or `[C, h, w]`. A U-Net takes other h and w as well."""
    context: Literal["none", "class", "vector", "tokens"] = "none"
    """What it is told: nothing, a class `[B]` (-1 is none of them), a vector `[B, D]`, or the states of tokens `[B, L, D]`."""
    context_size: int = 0
    """Number of classes, or D of vectors and tokens."""
    width: int = 64
    """Hidden units, or channels of the first level."""
    levels: int = 3
    """Hidden layers, or resolutions, each half the one before."""
    blocks: int = 1
    """Residual blocks a level."""

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3):
            raise ConfigError(f"a field moves vectors [D] or pictures [C, h, w]; the shape {list(self.shape)} is neither.")
        if (self.context == "none") != (self.context_size == 0):
            raise ConfigError(f"context {self.context!r} does not go with context_size {self.context_size}.")
        if len(self.shape) == 3 and any(side % self.multiple for side in self.shape[1:]):
            raise ConfigError(
                f"a U-Net of {self.levels} levels halves {self.shape[1]} x {self.shape[2]} {self.levels - 1} times, and "
                "they must stay whole; choose another data.resolution or fewer field.levels."
            )

    @property
    def multiple(self) -> int:
        """Sides of what a U-Net moves must be multiples of this."""
        return int(2 ** (self.levels - 1))


class Field(nn.Module):
    """v_θ(s, y, c). It starts as zero everywhere: an untrained flow changes nothing."""

    def __init__(self, settings: FieldSettings) -> None:
        super().__init__()
        self.settings = settings
        self.null: nn.Parameter | None = None
        if settings.context in ("vector", "tokens"):
            self.null = nn.Parameter(torch.zeros(settings.context_size))
        self.net: nn.Module = Perceptron(settings) if len(settings.shape) == 1 else _unet(settings)

    def forward(self, s: Tensor, y: Tensor, context: Tensor | None = None, dropped: Tensor | None = None) -> Tensor:
        """Velocities `[B, ...]` at times s `[B]` in [0, 1] and places y `[B, ...]`.

        context: as the settings say. dropped: `[B]` bool, the rows that are told nothing; None drops none, and no context
        drops all.
        """
        told = self._told(context, dropped, len(y), y.device)
        if isinstance(self.net, Perceptron):
            return self.net(s, y, told)
        times = s * TIMES
        match self.settings.context:
            case "none":
                return self.net(y, times, return_dict=False)[0]
            case "class":
                return self.net(y, times, class_labels=told, return_dict=False)[0]
        return self.net(y, times, encoder_hidden_states=told, return_dict=False)[0]

    def _told(self, context: Tensor | None, dropped: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """Classes `[B]` with one more for nothing, vectors `[B, D]` or tokens `[B, L, D]`, those of nothing learned."""
        kind, size = self.settings.context, self.settings.context_size
        if kind == "none":
            return None
        if context is None:
            dropped = torch.ones(count, dtype=torch.bool, device=device)
            context = torch.zeros(count, *([] if kind == "class" else [size]), device=device)
        if kind == "class":
            labels = context.long()
            nothing = labels < 0 if dropped is None else dropped | (labels < 0)
            return torch.where(nothing, size, labels)
        if dropped is not None and self.null is not None:
            rows = dropped.view(-1, *[1] * (context.dim() - 1))
            context = torch.where(rows, self.null.to(context.dtype), context)
        # A U-Net attends to tokens: a vector is one of them.
        return context[:, None] if context.dim() == 2 and not isinstance(self.net, Perceptron) else context


class Perceptron(nn.Module):
    """Layers of one width with SiLU between; time, and what is told, are added before the first."""

    def __init__(self, settings: FieldSettings) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        width, size = settings.width, settings.shape[0]
        self.waves = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(64, width)
        self.enter = nn.Linear(size, width)
        self.told: nn.Module | None = None
        if settings.context == "class":
            self.told = nn.Embedding(settings.context_size + 1, width)
        elif settings.context in ("vector", "tokens"):
            self.told = nn.Linear(settings.context_size, width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(settings.levels - 1))
        self.leave = zeroed(nn.Linear(width, size))

    def forward(self, s: Tensor, y: Tensor, told: Tensor | None) -> Tensor:
        """`[B, D]`; of tokens `[B, L, D]` the mean is told."""
        x = self.enter(y) + self.time(self.waves(s * TIMES).to(y.dtype))
        if self.told is not None and told is not None:
            x = x + self.told(told if told.dim() < 3 else told.mean(1))
        for layer in self.inner:
            x = layer(nn.functional.silu(x))
        return self.leave(nn.functional.silu(x))


def zeroed(layer: Any) -> Any:
    """The layer, with weights and bias 0."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer


def _unet(settings: FieldSettings) -> nn.Module:
    """diffusers' U-Net, with attention below its first level, to tokens where there are any."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    levels, (channels, *sides) = settings.levels, settings.shape
    crossing = settings.context in ("vector", "tokens")
    plain, attending = ("", "CrossAttn") if crossing else ("", "Attn")
    kinds = [plain if level == 0 and levels > 1 else attending for level in range(levels)]
    shared: dict[str, Any] = dict(
        sample_size=tuple(sides),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=settings.blocks,
        block_out_channels=tuple(settings.width * min(2**level, 2) for level in range(levels)),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=math.gcd(32, settings.width),
        attention_head_dim=8,
    )
    net: Any
    if crossing:
        net = UNet2DConditionModel(cross_attention_dim=settings.context_size, **shared)
    else:
        classes = {"num_class_embeds": settings.context_size + 1} if settings.context == "class" else {}
        net = UNet2DModel(**classes, **shared)
    zeroed(net.conv_out)
    return net


def make_field(settings: FieldSettings, seed: int) -> Field:
    """A new field, its weights drawn from `seed` and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Field(settings)


def save_field(field: Field, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write `field.safetensors` and `field.json`; `about` is kept in the latter, and `read_about` gives it back."""
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in field.state_dict().items()}
    with atomic(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    write_text(folder / SETTINGS, json.dumps({"field": asdict(field.settings), **(about or {})}, indent=1) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """What `field.json` holds. Raises CheckpointError."""
    try:
        about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return dict(about)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no field ({reason(error)}); give the folder of a finished flow run.") from error


def load_field(folder: Path, device: torch.device | str = "cpu") -> Field:
    """The field that `save_field` wrote, frozen. Raises CheckpointError."""
    about = read_about(folder)
    try:
        settings = FieldSettings(**about["field"] | {"shape": tuple(about["field"]["shape"])})
        field = Field(settings)
        field.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError, ConfigError) as error:
        raise CheckpointError(f"the field in {folder} cannot be read ({reason(error)}); copy or train it again.") from error
    return field.requires_grad_(False).eval().to(device)
