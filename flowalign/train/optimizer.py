"""What moves the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from flowalign.errors import MissingExtraError
from flowalign.settings import Loop


def make_optimizer(cfg: Loop, parameters: Sequence[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it, or bitsandbytes' 8-bit one. Raises MissingExtraError where that is not installed."""
    if cfg.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "cuda", "train.optimizer=adamw8bit") from error
        return AdamW8bit(
            list(parameters), lr=cfg.learning_rate, betas=cfg.adam_betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay
        )
    return torch.optim.AdamW(
        list(parameters),
        lr=cfg.learning_rate,
        betas=cfg.adam_betas,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=device.type in ("cuda", "cpu"),
    )
