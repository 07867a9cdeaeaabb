"""What a configuration chooses among: times, what learns, how many pictures go together."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from flowalign.align.mixture import by_type, type_seed
from flowalign.align.timesteps import Importance
from flowalign.errors import ConfigError
from flowalign.families.base import Family
from flowalign.settings import Config
from flowalign.train.trainable import make_trainable


def choose_timesteps(config: Config, family: Family) -> str:
    """The sampler of times: the family's own unless another is named. Importance sampling learns on top of the family's."""
    return family.timesteps if config.train.timesteps in ("auto", "importance") else config.train.timesteps


def choose_trainable(config: Config, family: Family, policy: nn.Module) -> None:
    """Turn on gradients for what the configuration trains of `policy`, the denoiser or several. Raises ConfigError."""
    wanted = config.trainable
    for place, each in enumerate(by_type(policy)):
        make_trainable(
            each,
            wanted.kind,
            rank=wanted.rank,
            alpha=wanted.alpha,
            targets=wanted.targets or family.lora_targets,
            idle=family.idle,
            seed=type_seed(config.train.seed, place),
            gradient_checkpointing=wanted.gradient_checkpointing,
        )


def choose_chunk(config: Config) -> int | None:
    """Pictures that go through the denoiser together; None where all do."""
    return config.train.chunk if config.train.backward == "chunked" else None


def choose_importance(config: Config, accelerator: Accelerator) -> Importance | None:
    """What learns which times to draw, where that is asked for. Raises ConfigError."""
    if config.train.timesteps != "importance":
        return None
    if config.reference.bank is not None:
        raise ConfigError(
            "train.timesteps 'importance' learns which times to draw, and with reference.bank "
            f"{config.reference.bank} each comparison keeps its own; set reference.bank=null, or train.timesteps=auto."
        )
    return Importance(accelerator.device, accelerator.gather)
