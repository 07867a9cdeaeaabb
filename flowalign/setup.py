"""From a configuration to parts that are ready to train: device, family, cached data, policy and reference, step."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from flowalign import plugins
from flowalign.align.attention import forwards
from flowalign.align.bank import ReferenceBank
from flowalign.align.carried import Carried
from flowalign.align.fill import fill_banks
from flowalign.align.reference import MOVING, Following, following, with_reference
from flowalign.align.step import PreferenceStep
from flowalign.align.switches import check
from flowalign.align.timesteps import Importance
from flowalign.config import check_knobs
from flowalign.data.batch import Batch
from flowalign.data.pairs import PairDataset, PairStream
from flowalign.errors import ConfigError, MissingExtraError, allowed
from flowalign.families.base import Family
from flowalign.families.loading import detect_family
from flowalign.families.sampling import PRECISIONS
from flowalign.settings import Config
from flowalign.sources import cache_folder, load_data
from flowalign.train.quantized import quantize
from flowalign.train.ranks import Ranks
from flowalign.train.trainable import assemble, make_trainable, trained


@dataclass(frozen=True)
class Prepared:
    """Everything `fit` needs, and what a run writes about it."""

    config: Config
    accelerator: Accelerator
    family: Family
    policy: nn.Module
    """The denoiser that learns, as a plain module."""
    model: nn.Module
    """The same, prepared for ranks, precision and compilation: what is called."""
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None
    step: PreferenceStep
    train: PairDataset
    held_out: PairDataset | None
    held_out_bank: ReferenceBank | None
    data: dict[str, Any]
    """Summary of the comparisons."""
    about: dict[str, object]
    """What a saved state must agree with."""
    ranks: Ranks
    following: Following | None = None
    """What moves the reference, where it does."""
    plain: nn.Module | None = None
    """Where the policy lies in shards: a module like it for the whole weights, in the process that writes."""

    @contextmanager
    def whole(self) -> Iterator[nn.Module | None]:
        """The policy with all its weights, in the process that writes, None in the others; every process must ask."""
        if not self.accelerator.is_fsdp2:
            yield self.policy if self.ranks.main else None
            return
        assemble(self.policy, self.plain)
        if self.plain is None:
            yield None
            return
        try:
            yield self.plain.to(self.accelerator.device)
        finally:
            self.plain.to("cpu")

    def batches(self, position: int) -> Iterator[Batch]:
        """This rank's micro-batches from a place in the endless sequence of comparisons."""
        return iter(pair_stream(self.config, self.accelerator, self.train, position))

    def first_batch(self) -> Batch:
        return next(self.batches(0))


def pair_stream(config: Config, accelerator: Accelerator, train: PairDataset, position: int = 0) -> PairStream:
    """The run's endless sequence of comparisons, as this rank gets it."""
    return PairStream(
        train,
        config.train.seed,
        batch_size=config.train.batch_size * accelerator.num_processes,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        position=position,
        caption_dropout=config.train.caption_dropout,
        cycle=config.reference.bank,
        workers=config.data.workers,
        pin_memory=accelerator.device.type == "cuda",
    )


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


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """An Accelerator for this run's device, precision and trackers. Raises ConfigError."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = choose_device(config.train.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
        if device.index is not None:
            torch.cuda.set_device(device)
    if config.train.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision 'fp16' needs a GPU; allowed on a CPU: fp32, bf16.")
    AcceleratorState._reset_state(reset_partial_state=True)  # or a second run in this process would keep the first one's
    precision = "no" if config.train.precision == "fp32" else config.train.precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=device.type == "cpu",
            log_with=list(config.train.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.train.timeout))],
        )
        if config.train.trackers:
            accelerator.init_trackers("flowalign")
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train.trackers {list(config.train.trackers)} cannot be used: {error}") from error
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on GPUs only and would go on without a word; what it then does works on CPUs as well.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.is_fsdp2 and config.reference.kind in MOVING:
        raise ConfigError(
            f"reference.kind {config.reference.kind!r} follows weights that lie whole in every process, and FSDP 2 shards "
            "them; set reference.kind=auto, or use configs/accelerate/ddp.yaml."
        )
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ConfigError(
            f"accelerate's configuration asks for {kind.value}, whose saved states cannot be resumed here; allowed: plain data "
            "parallelism and FSDP 2, as in configs/accelerate/ddp.yaml and fsdp2.yaml."
        )
    return accelerator


def load_family(config: Config, device: torch.device) -> Family:
    """The checkpoint's family on `device`, an outline on meta: in float32 where all weights learn, else as it computes."""
    model, name, outline = config.model, config.model.family, device.type == "meta"
    if name == "auto":
        name = detect_family(model.checkpoint, revision=model.revision, variant=model.variant, weights=not outline)
    dtype = PRECISIONS[config.train.precision] if config.trainable.kind == "lora" else torch.float32
    kind = plugins.load("families", name)
    make = kind.outline if outline else kind.load
    family: Family = make(model.checkpoint, dtype=dtype, revision=model.revision, variant=model.variant)
    family.denoiser.to(device)
    if model.quantize is not None:
        quantize(family.denoiser, model.quantize, trainable=config.trainable.kind)
    return family


def load_objective(config: Config) -> tuple[Any, dict[str, Any]]:
    """The objective's function and all its knobs, defaults included. Raises ConfigError for an unknown one."""
    objective = plugins.load("objectives", config.objective.name)
    parameters = inspect.signature(objective, eval_str=True).parameters
    check_knobs(config.objective.name, config.objective.knobs, parameters)
    defaults = {name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return objective, defaults | config.objective.knobs


def choose_timesteps(config: Config, family: Family) -> str:
    """The sampler of times: the family's own unless another is named. Importance sampling learns on top of the family's."""
    return family.timesteps if config.train.timesteps in ("auto", "importance") else config.train.timesteps


def choose_trainable(config: Config, family: Family, policy: nn.Module) -> None:
    """Turn on gradients for what the configuration trains of `policy`. Raises ConfigError."""
    wanted = config.trainable
    make_trainable(
        policy,
        wanted.kind,
        rank=wanted.rank,
        alpha=wanted.alpha,
        targets=wanted.targets or family.lora_targets,
        seed=config.train.seed,
        gradient_checkpointing=wanted.gradient_checkpointing,
    )


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


def make_optimizer(config: Config, parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it, or bitsandbytes' 8-bit one."""
    cfg = config.train
    if cfg.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "cuda", "train.optimizer=adamw8bit") from error
        return AdamW8bit(
            parameters, lr=cfg.learning_rate, betas=cfg.adam_betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=cfg.learning_rate,
        betas=cfg.adam_betas,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=device.type in ("cuda", "cpu"),
    )


def prepare(config: Config, accelerator: Accelerator, *, progress: bool = True) -> Prepared:
    """Load, cache and build all parts of an alignment. Raises UserErrors for what cannot be used."""
    ranks = Ranks(accelerator, config.train.timeout)
    ranks.agree(config.model_dump(mode="json"))
    objective, knobs = load_objective(config)
    family = load_family(config, accelerator.device)
    importance = choose_importance(config, accelerator)
    timesteps = choose_timesteps(config, family)
    about: dict[str, object] = {
        "denoiser": family.fingerprint("denoiser"),
        "pairs_per_step": config.train.batch_size * config.train.accumulation * ranks.count,
        "objective": {"name": config.objective.name, **knobs},
        "reference": config.reference.model_dump(mode="json"),
        "switches": config.switches.model_dump(mode="json"),
        "trainable": config.trainable.model_dump(mode="json"),
        "train": config.train.model_dump(
            mode="json",
            include={"seed", "caption_dropout", "timestep_range", "precision", "optimizer"},
        )
        | {"timesteps": timesteps if importance is None else f"importance over {timesteps}"}
        | ({} if importance is None else {"log_every": config.train.log_every}),  # when it learns
    }
    if config.guard.policy in ("lower_lr", "rollback"):  # it changes the rate, when and where it sees something
        rhythm = config.train.model_dump(include={"log_every", "validate_every", "validation_draws"})
        about["guard"] = config.guard.model_dump(mode="json") | rhythm
    train, held_out, summary = load_data(config, family, Path(config.output), progress, ranks)
    about["data"] = {"comparisons": len(train), "ids": hashlib.blake2b(train.cached.ids.tobytes(), digest_size=8).hexdigest()}
    # Tensor cores take convolutions channels-last without a transposition; a CPU was slower with it (docs/performance.md).
    layout = torch.channels_last if accelerator.device.type == "cuda" else torch.contiguous_format
    frozen = family.denoiser.requires_grad_(False).to(memory_format=layout)
    # Compiled models have kernels of their own, and a checkpointed block is computed again outside of any context.
    own_kernels = not (config.train.compile or config.trainable.gradient_checkpointing)
    check(config, objective, knobs, *(each.cached for each in (train, held_out) if each is not None))
    carried = None
    if objective.carry is not None:
        carried = Carried(objective.carry, knobs, accelerator.device, lambda values: accelerator.reduce(values, "mean"))
    compiled = torch.compile if config.train.compile else lambda module: module
    anchor = compiled(frozen)
    step = PreferenceStep(
        family=family,
        policy=frozen,
        reference=anchor,
        objective=objective,
        knobs=knobs,
        timesteps=timesteps,
        device=accelerator.device,
        autocast=forwards(accelerator.autocast, accelerator.device, kernels=own_kernels),
        memory_format=layout,
        between=config.train.timestep_range,
        num_chosen=train.cached.num_chosen,
        switches=config.switches,
        importance=importance,
        carried=carried,
    )
    bank = held_out_bank = None
    if config.reference.bank is not None:
        stream, folder = pair_stream(config, accelerator, train), cache_folder(config.data.cache)
        bank, held_out_bank = fill_banks(config, accelerator, step, stream, held_out, folder, progress=progress)
    lora = config.trainable.kind == "lora"
    policy, reference = with_reference(frozen, config.reference.kind, lora=lora, banked=bank is not None)
    choose_trainable(config, family, policy)
    policy.to(memory_format=layout)
    moving = None
    if config.reference.kind in MOVING:
        reference, moving = following(policy, frozen, config.reference, lora=lora)
        anchor = compiled(reference) if lora else anchor
    optimizer = make_optimizer(config, list(trained(policy).values()), accelerator.device)
    plain = copy.deepcopy(policy).to("cpu") if accelerator.is_fsdp2 and ranks.main else None
    model, optimizer = accelerator.prepare(compiled(policy), optimizer)
    if accelerator.is_fsdp2 and reference is not None:
        fsdp2_prepare_model(accelerator, frozen)
    # Precision is the step's own autocast; accelerate's wrapper would also follow the policy into diffusers pipelines.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    step = replace(step, policy=model, reference=None if reference is None else anchor, bank=bank)
    ema = {name: p.detach().clone() for name, p in trained(policy).items()} if config.train.ema else None
    return Prepared(
        config,
        accelerator,
        family,
        policy,
        model,
        optimizer,
        ema,
        step,
        train,
        held_out,
        held_out_bank,
        summary,
        about,
        ranks,
        moving,
        plain,
    )
