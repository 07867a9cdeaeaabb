"""DeepSpeed's ZeRO 1 and 2: AdamW's moments, and with 2 the gradients too, lie in parts over the processes.

DeepSpeed flattens what learns into one tensor, of which every process moves its part. Its own checkpoints are pickles and are
not used: `Zero` shows the moments of each parameter, so that saved states are the same files as without DeepSpeed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn

from flowalign.errors import ConfigError, MissingExtraError, reason
from flowalign.sections import Loop

MOMENTS = ("exp_avg", "exp_avg_sq")
OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""What the section train decides, whatever DeepSpeed's configuration says."""
PRECISION = ("fp16", "bf16", "torch_autocast")
OFFLOAD = ("offload_optimizer", "offload_param")
KNOWN = {*OURS, *PRECISION, "zero_optimization", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"}
BUCKETS = {
    *("stage", "reduce_bucket_size", "allgather_bucket_size"),
    *("allgather_partitions", "reduce_scatter", "overlap_comm", "contiguous_gradients"),
}
"""Of zero_optimization: how much is sent at a time. What begins with stage3_ has no effect here. round_robin_gradients is not
among them: with it DeepSpeed 0.19.8 gives the moments of one parameter for those of another."""


def by_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed moves the weights."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_plugin(cfg: Loop, device: torch.device) -> DeepSpeedPlugin | None:
    """What accelerate is to know of DeepSpeed, None where its launcher does not ask for it, or for one process on a CPU, which
    accelerate runs without.

    Raises ConfigError for what cannot be used, MissingExtraError where DeepSpeed is not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed", "accelerate's configuration asks for DeepSpeed; it")
    try:
        plugin = DeepSpeedPlugin()
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"accelerate's configuration of DeepSpeed cannot be used ({reason(error)}); start from "
            "configs/accelerate/deepspeed.yaml."
        ) from error
    plugin.deepspeed_config |= settled(plugin.deepspeed_config, cfg)
    alone = device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) == 1
    return None if alone else plugin


def settled(config: Mapping[str, Any], cfg: Loop) -> dict[str, Any]:
    """What a run decides of DeepSpeed's configuration. Raises ConfigError for what cannot be used."""
    zero = config["zero_optimization"]
    stage = zero.get("stage")
    if stage == 3:
        raise ConfigError(
            "accelerate's configuration asks for ZeRO stage 3, and weights that DeepSpeed shards cannot be saved or drawn from "
            "here; allowed: stage 1 and 2, or FSDP 2, which shards weights as well (configs/accelerate/fsdp2.yaml)."
        )
    if stage not in (1, 2):
        raise ConfigError(
            f"accelerate's configuration asks for ZeRO stage {stage}, which shards nothing; allowed: stage 1 and 2, or "
            "configs/accelerate/ddp.yaml."
        )
    for part in OFFLOAD:
        if (where := (zero.get(part) or {}).get("device", "none")) not in (None, "none"):
            raise ConfigError(
                f"accelerate's configuration sets {part} to {where!r}, and DeepSpeed then puts an optimizer of its own in the "
                "place of train.optimizer; set it to none, or use configs/accelerate/fsdp2.yaml."
            )
    for part in PRECISION:
        if (config.get(part) or {}).get("enabled") is True:
            raise ConfigError(
                f"DeepSpeed's configuration turns {part} on, which casts weights that must stay float32; leave it out: "
                "train.precision decides."
            )
    other = sorted({*config} - KNOWN)
    other += sorted(f"zero_optimization.{key}" for key in {*zero} - BUCKETS - {*OFFLOAD} if not key.startswith("stage3_"))
    if other:
        raise ConfigError(
            f"DeepSpeed's configuration sets {', '.join(other)}, with which runs are not known to be right; leave that out, as "
            f"configs/accelerate/deepspeed.yaml does; allowed in zero_optimization: {', '.join(sorted(BUCKETS))}."
        )
    if cfg.precision == "fp16":
        raise ConfigError(
            "train.precision 'fp16' needs a loss scale, which is not kept in saved states where DeepSpeed has it; allowed with "
            "DeepSpeed: bf16, fp32."
        )
    if cfg.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer {cfg.optimizer!r} keeps moments in blocks, which DeepSpeed's parts do not fit; set "
            "train.optimizer=adamw, or use configs/accelerate/ddp.yaml."
        )
    return {
        "train_micro_batch_size_per_gpu": cfg.batch_size,
        "gradient_accumulation_steps": 1,  # the loop divides the loss, and says which micro-step is the last
        "gradient_clipping": cfg.clip_norm or 0.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }


def on_cpus(accelerator: Accelerator, plugin: DeepSpeedPlugin) -> None:
    """Turn DeepSpeed on for several processes on CPUs, where accelerate would go on with plain ones without a word."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed takes a GPU that is there
    accelerator.state.deepspeed_plugins = plugin
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.DEEPSPEED


def zero_autocast(accelerator: Accelerator, cfg: Loop) -> Callable[[], AbstractContextManager[Any]]:
    """What forward passes run in. accelerate's own follows DeepSpeed's precision, which is off."""
    if cfg.precision == "bf16":
        return partial(torch.autocast, accelerator.device.type, torch.bfloat16)
    return nullcontext


class _InAutocast(nn.Module):
    """A module that sets its own precision: DeepSpeed's forward turns any autocast around it off."""

    def __init__(self, module: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.module, self._autocast = module, autocast

    def _within(self, *arguments: Any, **named: Any) -> Any:  # whatever the denoiser of a family takes
        with self._autocast():
            return self.module(*arguments, **named)

    forward = _within


def zero_prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[nn.Module, Zero]:
    """(what is called, what moves the weights) for a model whose `parameters` learn."""
    from deepspeed.utils import logger

    for handler in logger.handlers:
        handler.setStream(sys.stderr)  # standard output is for what was asked for
    engine, wrapped = accelerator.prepare(_InAutocast(model, autocast), optimizer)
    return engine, Zero(engine, wrapped, parameters)


@dataclass(frozen=True)
class Moment:
    """A moment of one parameter, of which every process has a part or nothing."""

    parameter: nn.Parameter
    slot: str

    def full_tensor(self) -> Tensor:
        """The whole of it; every process must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(self.parameter, self.slot)


class Zero:
    """DeepSpeed's engine as the loop and a saved state see it: an optimizer, and a `Descent`."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._engine, self._optimizer, self._parameters = engine, optimizer, list(parameters)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer inside, where learning rates are set."""
        return self._optimizer.param_groups

    @property
    def _flat(self) -> Tensor:
        """This process's part of all that learns; `make_optimizer` has one group."""
        return self.param_groups[0]["params"][0]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """As AdamW has it, by parameter. Moments are put together by those who ask for them."""
        slots = self._optimizer.state.get(self._flat)
        if not slots:
            return {}
        return {p: {"step": slots["step"]} | {slot: Moment(p, slot) for slot in MOMENTS} for p in self._parameters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over whole moments, zeros where there are none; and weights, changed in place, of which DeepSpeed has a copy."""
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        saved, flat = state["state"], self._flat
        slots = self._optimizer.state[flat]
        if not slots:  # DeepSpeed leaves that to the first step, which then finds these and goes on with them
            slots["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            slots |= {slot: torch.zeros_like(flat) for slot in MOMENTS}
            lazy_init_hp_params_optimizer_state(self._parameters, flat, self._optimizer.state)
        slots["step"].fill_(float(saved[0]["step"]) if saved else 0.0)
        for index, parameter in enumerate(self._parameters):
            safe_set_full_fp32_param(parameter, parameter.detach())
            for slot in MOMENTS:
                whole = saved[index][slot] if saved else torch.zeros_like(parameter)
                safe_set_full_optimizer_state(parameter, whole, slot)

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """DeepSpeed itself keeps gradients apart until the last; its no_sync is not for ZeRO 2."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self) -> Tensor:
        """Clip, move the weights and drop the gradients; their norm before, infinite where it was not finite."""
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._flat.device)
