"""From a configuration to parts that are ready to train: family, cached data, policy and reference, step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from flowalign import plugins
from flowalign.align.adaptive import adaptive
from flowalign.align.attention import forwards
from flowalign.align.bank import ReferenceBank
from flowalign.align.carried import Carried
from flowalign.align.checks import check
from flowalign.align.fill import fill_banks
from flowalign.align.merged import open_merged
from flowalign.align.mixture import Annotators, MixtureStep, by_type, make_annotators, of_types
from flowalign.align.personal import personal_policy
from flowalign.align.reference import BEGINNING, MOVING, Following, following, standing, with_reference
from flowalign.align.steer import Steered, by_part, contrast_of, steered_policy
from flowalign.align.step import PreferenceStep
from flowalign.chosen import choose_chunk, choose_importance, choose_timesteps, choose_trainable
from flowalign.config import check_knobs
from flowalign.data.batch import Batch
from flowalign.data.pairs import PairDataset, PairStream, sequential
from flowalign.device import choose_autocast, choose_layout, choose_workers
from flowalign.families.base import CONTEXT, Family
from flowalign.families.loading import detect_family
from flowalign.families.sampling import PRECISIONS
from flowalign.settings import AUTO, Config
from flowalign.sources import cache_folder, load_data
from flowalign.train.optimizer import make_optimizer
from flowalign.train.quantized import quantize
from flowalign.train.ranks import Ranks
from flowalign.train.start import read_start
from flowalign.train.trainable import assemble, trained
from flowalign.train.zero import Zero, by_zero, zero_prepare


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
    optimizer: torch.optim.Optimizer | Zero
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
    annotators: Annotators | None = None
    """Who is of which type, where there is a policy for each."""
    plain: nn.Module | None = None
    """Where the policy lies in shards: a module like it for the whole weights, in the process that writes."""

    def _moving(self) -> list[Carried | Following | Annotators]:
        parts = (self.step.carried, self.step.adaptive, self.following, self.annotators)
        return [part for part in parts if part is not None]

    def after(self, step: int) -> None:
        """What moves once an optimizer step, beside the weights; for `Hooks.after`."""
        for part in self._moving():
            part.after(step)

    def learned(self) -> dict[str, Tensor]:
        """What a run learns beside the weights, to be saved with them and restored in place."""
        importance = self.step.importance
        parts = [*self._moving(), *([importance] if importance is not None else [])]
        return {name: tensor for part in parts for name, tensor in part.tensors().items()}

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
        """Told nothing, where a policy goes on from an earlier run, see `at_start`."""
        batch = next(self.batches(0))
        if not self._goes_on or batch.objective_weights is None:
            return batch
        return replace(batch, objective_weights=torch.zeros_like(batch.objective_weights))

    @property
    def _goes_on(self) -> bool:
        """The policy is not the model before its first step: an earlier run's, or one that a user is taken in by."""
        users = self.config.users
        return self.config.trainable.start is not None or (users is not None and users.known is not None)

    @property
    def full_step(self) -> PreferenceStep | MixtureStep:
        """What `fit` calls: the step, of all policies where there are several."""
        return self.step if self.annotators is None else MixtureStep(self.step, self.annotators)

    @property
    def at_start(self) -> PreferenceStep | MixtureStep:
        """The same held against the model that the policy starts as, which is not what several references say.

        Where it starts from an earlier run, that is the policy itself, told nothing: its margin to the model it once came from
        is not 0. Where a user is taken in, that is what the policy draws for nobody.
        """
        step, several = self.step, self.config.reference.kind == "merged"
        if self._goes_on or several:
            step = replace(step, reference=by_part(self.policy)[0] if self._goes_on else self.family.denoiser, bank=None)
        return replace(self, step=step).full_step


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
        weights_dropout=told.dropout if (told := config.steer or config.users) else 0.0,
        cycle=config.reference.bank,
        workers=choose_workers(config.data, accelerator.device),
        pin_memory=accelerator.device.type == "cuda",
    )


def load_family(config: Config, device: torch.device) -> Family:
    """The checkpoint's family on `device`, an outline on meta: in float32 where all weights learn, else as it computes."""
    model, name, outline = config.model, config.model.family, device.type == "meta"
    if name == "auto":
        name = detect_family(model.checkpoint, revision=model.revision, variant=model.variant, weights=not outline)
    dtype = PRECISIONS[config.train.precision] if config.trainable.kind != "full" else torch.float32
    kind = plugins.load("families", name)
    make = kind.outline if outline else kind.load
    family: Family = make(model.checkpoint, dtype=dtype, revision=model.revision, variant=model.variant)
    if model.quantize is not None:
        quantize(family.denoiser, model.quantize, device, trainable=config.trainable.kind)
    family.denoiser.to(device)
    return family


def load_objective(config: Config) -> tuple[Any, dict[str, Any]]:
    """The objective's function and all its knobs, defaults included. Raises ConfigError for an unknown one.

    A β that is yet to be found is the default one here.
    """
    objective = plugins.load("objectives", config.objective.name)
    parameters = inspect.signature(objective, eval_str=True).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    knobs = config.objective.knobs
    if knobs.get("beta") == AUTO and "beta" in defaults:
        knobs["beta"] = defaults["beta"]
    check_knobs(config.objective.name, knobs, parameters)
    return objective, defaults | knobs


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
        "trainable": config.trainable.model_dump(mode="json", exclude={"start"}),
        "train": config.train.model_dump(
            mode="json",
            include={"seed", "caption_dropout", "timestep_range", "precision", "optimizer"},
        )
        | {"timesteps": timesteps if importance is None else f"importance over {timesteps}"}
        | ({} if importance is None else {"log_every": config.train.log_every}),  # when it learns
    }
    about["steer"] = None if config.steer is None else config.steer.model_dump(mode="json")
    begins = None
    if config.trainable.start is not None:
        begins = read_start(config.trainable, config.model, family, config.steer, config.users)
    about["start"] = None if begins is None else begins.fingerprint
    if config.guard.policy in ("lower_lr", "rollback"):  # it changes the rate, when and where it sees something
        rhythm = config.train.model_dump(include={"log_every", "validate_every", "validation_draws"})
        about["guard"] = config.guard.model_dump(mode="json") | rhythm
    train, held_out, summary = load_data(config, family, Path(config.output), progress, ranks)
    people = config.users
    about["users"] = None if people is None else people.model_dump(mode="json") | {"names": list(train.users)}
    about["data"] = train.cached.about | {"resolution": config.data.resolution, "flip": config.data.flip or None}
    layout, autocast = choose_layout(accelerator), choose_autocast(accelerator, config.train)
    frozen = family.denoiser.requires_grad_(False).to(memory_format=layout)
    # Compiled models have kernels of their own, and a checkpointed block is computed again outside of any context.
    own_kernels = not (config.train.compile or config.trainable.gradient_checkpointing)
    check(config, family, objective, knobs, *(each.cached for each in (train, held_out) if each is not None))

    def over_ranks(values: Tensor) -> Tensor:
        return accelerator.reduce(values, "mean")

    annotators = None
    if config.switches.annotator_types > 1:
        total = partial(accelerator.reduce, reduction="sum")
        annotators = make_annotators(config, train.cached, ranks.count, accelerator.device, total)
        about["annotators"] = annotators.fingerprint
    compiled = torch.compile if config.train.compile else lambda module: module
    anchor = compiled(frozen)
    if config.reference.kind == "merged":
        merged = open_merged(config.reference, config.model, family).to(memory_format=layout)
        about["references"], anchor = merged.about, merged.compiled(compiled)
    step = PreferenceStep(
        family=family,
        policy=frozen,
        reference=anchor,
        objective=objective,
        knobs=knobs,
        timesteps=timesteps,
        device=accelerator.device,
        autocast=forwards(autocast, accelerator.device, kernels=own_kernels),
        memory_format=layout,
        between=config.train.timestep_range,
        num_chosen=train.cached.num_chosen,
        switches=config.switches,
        importance=importance,
        carried=Carried.of(objective, knobs, accelerator.device, over_ranks),
        adaptive=adaptive(config.switches, knobs, accelerator.device, over_ranks, steps=config.train.steps),
        chunk=choose_chunk(config),
    )
    bank = held_out_bank = None
    if config.reference.bank is not None:
        stream, folder = pair_stream(config, accelerator, train), cache_folder(config.data.cache)
        place = accelerator.device, ranks
        bank, held_out_bank = fill_banks(config, *place, step, stream, held_out, folder, progress=progress)
    lora = config.trainable.kind != "full"
    if begins is not None and not lora and config.reference.kind in BEGINNING:
        begins.into(frozen)
    policy, reference = with_reference(frozen, config.reference.kind, lora=lora, banked=bank is not None)
    policy = of_types(policy, config.switches.annotator_types)
    choose_trainable(config, family, policy)
    if begins is not None:
        begins.into(policy)
    width = next(sequential(train, 1)).conditioning.tensors[CONTEXT].shape[-1]
    policy = steered_policy(policy, config.steer, width, config.train.seed, None if begins is None else begins.steer)
    policy = personal_policy(policy, config.users, train.users, family, width, config.train.seed)
    policy.to(memory_format=layout)
    moving = None
    if config.reference.kind in MOVING:
        reference, moving = following(policy, frozen, config.reference, lora=lora)
    elif config.reference.kind == "start":
        reference = standing(policy, frozen, lora=lora)
    if config.reference.kind in BEGINNING and lora:
        anchor = compiled(reference)
    learning = list(trained(policy).values())
    optimizer = make_optimizer(config.train, learning, accelerator.device)
    plain = copy.deepcopy(policy).to("cpu") if accelerator.is_fsdp2 and ranks.main else None
    if by_zero(accelerator):
        model, optimizer = zero_prepare(accelerator, compiled(policy), optimizer, learning, autocast)
    else:
        model, optimizer = accelerator.prepare(compiled(policy), optimizer)
    if accelerator.is_fsdp2 and reference is not None:
        fsdp2_prepare_model(accelerator, frozen)
    # Precision is the step's own autocast; accelerate's wrapper would also follow the policy into diffusers pipelines.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    kinds = {"types": len(by_type(policy)), "steered": isinstance(policy, Steered), "contrast": contrast_of(config.steer)}
    step = replace(step, policy=model, **kinds, reference=None if reference is None else anchor, bank=bank)
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
        annotators,
        plain,
    )
