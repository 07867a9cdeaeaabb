"""Where a run computes: the device, its precision, and the processes it shares the work with."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from flowalign.align.reference import BEGINNING
from flowalign.errors import ConfigError, allowed
from flowalign.settings import Config, Loop


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps -> a device that is there. Raises ConfigError."""
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not available here; {allowed(name, ('auto', 'cpu', 'cuda', 'mps'))}.") from error
    return device


def open_accelerator(train: Loop, folder: Path) -> Accelerator:
    """An Accelerator for the device, precision and trackers of whatever is trained. Raises ConfigError."""
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    device = choose_device(train.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.tf32
        if device.index is not None:
            torch.cuda.set_device(device)
    if train.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision 'fp16' needs a GPU; allowed on a CPU: fp32, bf16.")
    AcceleratorState._reset_state(reset_partial_state=True)  # or a second run in this process would keep the first one's
    precision = "no" if train.precision == "fp32" else train.precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=device.type == "cpu",
            log_with=list(train.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout))],
        )
        if train.trackers:
            accelerator.init_trackers("flowalign")
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train.trackers {list(train.trackers)} cannot be used: {error}") from error
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on GPUs only and would go on without a word; what it then does works on CPUs as well.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ConfigError(
            f"accelerate's configuration asks for {kind.value}, whose saved states cannot be resumed here; allowed: plain data "
            "parallelism and FSDP 2, as in configs/accelerate/ddp.yaml and fsdp2.yaml."
        )
    return accelerator


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
    if accelerator.is_fsdp2 and config.train.backward == "chunked":
        raise ConfigError(
            "train.backward 'chunked' runs the denoiser again while gradients flow, and FSDP 2 gathers weights for one pass; "
            "set train.backward=joint with trainable.gradient_checkpointing=true, or use configs/accelerate/ddp.yaml."
        )
    return accelerator
