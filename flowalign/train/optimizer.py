"""What moves the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowalign.errors import MissingExtraError
from flowalign.sections import Loop
from flowalign.train.checkpoint import State
from flowalign.train.ranks import gathered
from flowalign.train.zero import Zero


def make_optimizer(cfg: Loop, parameters: Sequence[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it, or bitsandbytes' 8-bit one. Raises MissingExtraError where that is not installed."""
    if cfg.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "cuda", "train.optimizer=adamw8bit") from error
        for parameter in parameters:  # as its first step leaves them, or moments in blocks would lie otherwise than weights
            parameter.data = parameter.data.contiguous()
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


class Descent:
    """What a step of the loop does with losses: gradients in every micro-step, then moved weights."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, state: State, clip_norm: float | None) -> None:
        self._accelerator, self._model = accelerator, model
        self._parameters, self._optimizer = list(state.parameters.values()), state.optimizer
        self._largest = math.inf if clip_norm is None else clip_norm

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and a backward pass; gradients of several processes meet in the last."""
        return nullcontext() if last else self._accelerator.no_sync(self._model)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss that is divided by the number of micro-steps."""
        self._accelerator.backward(loss)

    def step(self) -> Tensor:
        """Clip, move the weights and drop the gradients; their norm before."""
        self._accelerator.unscale_gradients()
        norm = gathered(torch.nn.utils.clip_grad_norm_(self._parameters, self._largest))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm


def make_descent(accelerator: Accelerator, model: nn.Module, state: State, clip_norm: float | None) -> Descent | Zero:
    """Our own steps, or those of DeepSpeed, which was told all it needs when it was set up."""
    return state.optimizer if isinstance(state.optimizer, Zero) else Descent(accelerator, model, state, clip_norm)
