"""Where a run computes: the device, its precision, and the processes it shares the work with."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from flowalign.align.reference import BEGINNING
from flowalign.errors import ConfigError, allowed
from flowalign.sections import Data, Loop
from flowalign.settings import Config
from flowalign.train.zero import by_zero, on_cpus, zero_autocast, zero_plugin


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps -> a device that is there. Raises ConfigError."""
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        choices = ("auto", "cpu", *(kind for kind, here in there.items() if here))
        raise ConfigError(f"device {name!r} is not available here; {allowed(name, choices)}.") from error
    return device


def training_device(train: Loop) -> torch.device:
    """Where something is trained. Raises ConfigError for a device that is not there, or does not know the precision."""
    device = choose_device(train.device)
    if train.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision 'fp16' needs a GPU; allowed on a CPU: fp32, bf16.")
    return device


def open_accelerator(train: Loop, folder: Path) -> Accelerator:
    """An Accelerator for the device, precision and trackers of whatever is trained. Raises ConfigError, MissingExtraError."""
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    device = training_device(train)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.tf32
        if device.index is not None:
            torch.cuda.set_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # or a second run in this process would keep the first one's
    zero = zero_plugin(train, device)
    precision = "no" if zero is not None or train.precision == "fp32" else train.precision  # or DeepSpeed casts weights
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=device.type == "cpu",
            deepspeed_plugin=zero,
            log_with=list(train.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout))],
        )
        if train.trackers:
            accelerator.init_trackers("flowalign")
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train.trackers {list(train.trackers)} cannot be used: {error}") from error
    # accelerate shards on GPUs only and would go on without a word; what it then does works on CPUs as well.
    if accelerator.distributed_type == DistributedType.MULTI_CPU and zero is not None:
        on_cpus(accelerator, zero)
    elif accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError(
            "accelerate's configuration asks for FSDP 1, whose saved states cannot be resumed here; allowed: plain data "
            "parallelism, FSDP 2 and DeepSpeed's ZeRO, as in configs/accelerate/ddp.yaml, fsdp2.yaml and deepspeed.yaml."
        )
    return accelerator


def choose_autocast(accelerator: Accelerator, train: Loop) -> Callable[[], AbstractContextManager[Any]]:
    """What sets the precision of a forward pass."""
    return zero_autocast(accelerator, train) if by_zero(accelerator) else accelerator.autocast


def choose_layout(accelerator: Accelerator) -> torch.memory_format:
    """How convolutions lie in memory. Tensor cores take them channels-last without a transposition; a CPU was slower with it
    (docs/performance.md), and DeepSpeed flattens and sends weights in the usual order only."""
    last = accelerator.device.type == "cuda" and not by_zero(accelerator)
    return torch.channels_last if last else torch.contiguous_format


def choose_workers(data: Data, device: torch.device) -> int:
    """How many processes read batches ahead: a GPU would wait for each, and a CPU has no cores to spare."""
    return data.workers if data.workers is not None else 2 if device.type == "cuda" else 0


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """The same for an alignment, whose settings must suit its processes. Raises ConfigError."""
    accelerator = open_accelerator(config.train, folder)
    several = config.switches.annotator_types > 1
    if accelerator.is_fsdp2 and (several or config.reference.kind in (*BEGINNING, "merged")):
        what = "switches.annotator_types above 1" if several else f"reference.kind {config.reference.kind!r}"
        raise ConfigError(
            f"{what} needs weights that lie whole in every process, and FSDP 2 shards them; set reference.kind=auto and "
            "switches.annotator_types=1, or use configs/accelerate/ddp.yaml."
        )
    if accelerator.is_fsdp2 and config.train.timesteps == "importance":
        raise ConfigError(
            "train.timesteps 'importance' measures gradients of single comparisons, which FSDP 2 keeps in shards; set "
            "train.timesteps=null, or use configs/accelerate/ddp.yaml."
        )
    if accelerator.is_fsdp2 and config.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer {config.train.optimizer!r} keeps moments in blocks, which do not fit the shards of FSDP 2; set "
            "train.optimizer=adamw, or use configs/accelerate/ddp.yaml."
        )
    if (accelerator.is_fsdp2 or by_zero(accelerator)) and config.train.backward == "chunked":
        once = "DeepSpeed adds up gradients" if by_zero(accelerator) else "FSDP 2 gathers weights"
        raise ConfigError(
            f"train.backward 'chunked' runs the denoiser again while gradients flow, and {once} for one pass; set "
            "train.backward=joint with trainable.gradient_checkpointing=true, or use configs/accelerate/ddp.yaml."
        )
    return accelerator
