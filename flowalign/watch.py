"""What a run shows: metrics on held-out comparisons, the guard and sample pictures along the way, weights at the end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from flowalign.align.bank import ReferenceBank
from flowalign.align.mixture import MixtureStep, by_type
from flowalign.align.personal import in_turn, kept_lora
from flowalign.align.reference import MOVING
from flowalign.align.steer import by_part, even_and_corners
from flowalign.align.step import PreferenceStep
from flowalign.config import dump
from flowalign.data.pairs import PairDataset, fixed_draws
from flowalign.evaluate.guard import ACCURACY, MARGIN, TIMES, Guard, guard_report, sentence
from flowalign.families.loading import USERS
from flowalign.families.personal import Personal, write_users
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.families.steer import STEER, Steering, Telling, write_steering
from flowalign.files import write_text
from flowalign.report.card import MADE
from flowalign.report.page import read_lines
from flowalign.rng import Keyed
from flowalign.settings import Config, Users
from flowalign.setup import Prepared
from flowalign.train.checkpoint import State, go_back, save, states
from flowalign.train.loop import Verdict
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import distance, export, trained


@torch.no_grad()
def validation(
    step: PreferenceStep | MixtureStep,
    held_out: PairDataset,
    config: Config,
    accelerator: Any,
    bank: ReferenceBank | None = None,
) -> dict[str, float]:
    """Metrics on held-out comparisons at fixed (t, noise) draws: the same numbers at each call for the same weights.

    Margin and accuracy are given for each of `TIMES` besides, parts of [0, 1] whatever the length of the schedule. Ties take no
    part in the accuracy: whichever picture wins, there is nothing to be right about. What is held out may be of another kind
    than what is trained on: pairs where groups are.
    """
    draws, rng = config.train.validation_draws, Keyed(config.train.seed + 1)
    fixed = step.on_held_out(bank, held_out.cached.num_chosen)
    sums: dict[str, torch.Tensor] = {}
    for draw in range(draws):
        batches = fixed_draws(held_out, config.train.batch_size, draws, draw)
        while group := list(islice(batches, accelerator.num_processes)):
            # Weights in shards come together in every forward, so all processes do equally many.
            spare = accelerator.process_index >= len(group)
            batch = group[-1 if spare else accelerator.process_index]
            counts = torch.full((len(batch),), float(not spare), device=accelerator.device)
            decided = counts * (batch.preference != 0.5).to(accelerator.device)
            _, metrics = fixed(batch, rng)
            weighted = {name: (value, decided if name == ACCURACY else counts) for name, value in metrics.items()}
            part = (fixed.times(batch, rng) * len(TIMES)).long().clamp(max=len(TIMES) - 1).to(accelerator.device)
            for name in {MARGIN, ACCURACY} & metrics.keys():
                value, weight = weighted[name]
                weighted |= {f"{name}/{label}": (value, weight * (part == place)) for place, label in enumerate(TIMES)}
            for name, (value, weight) in weighted.items():
                sums[name] = sums.get(name, 0) + torch.stack([(value * weight).sum(), weight.sum()])
    names = sorted(sums)
    totals = accelerator.reduce(torch.stack([sums[name] for name in names]), "sum").tolist()
    return {name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight}


class Recorder:
    """Writes a run's metrics, has the guard look at them, and does what it says. Made before a saved state is loaded."""

    def __init__(self, ready: Prepared, run: RunDir) -> None:
        cfg, held_out = ready.config.train, 0 if ready.held_out is None else len(ready.held_out)
        self._ready, self._run = ready, run
        self._start = _first_weights(ready)
        self.guard = Guard(
            ready.config.guard,
            pairs_per_step=cfg.batch_size * cfg.accumulation * ready.ranks.count,
            held_out=held_out,
            draws=cfg.validation_draws,
            along=held_out > 0 and cfg.validate_every is not None,
        )

    def record(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics; every process calls it."""
        if self._start is not None and "train/loss" in values:
            values = values | {"train/update_norm": distance(trained(self._ready.policy), self._start)}
        self.guard.note(step, values)
        if self._ready.ranks.main:
            self._run.record(step, values)
        self._ready.accelerator.log(values, step=step)

    def judge(self, state: State, broken: bool) -> Verdict:
        """Ask the guard, and record it, lower the rate or go back to the good state as it says. Alike in all processes.

        A run that ends with something not finite goes back too: what it is may not be saved, so a whole state knows its end.
        A way back is written in an order that a kill at any point does not harm: a resume does the rest of it again.
        """
        ready, run = self._ready, self._run
        verdict, events = self.guard.judge(state.step, state.rate, good=state.good is not None, broken=broken)
        for event in events:
            state.rate = event.rate
            if ready.ranks.main:
                tqdm.write(f"guard: {sentence(event)}")
        broken = any(event.watch == "non_finite" for event in events)
        if verdict == "back" or (verdict == "stop" and broken and states(run.states)):
            go_back(run.states, state, ready.about, ready.ranks)
            if verdict == "stop":
                self.guard.end()
        if ready.ranks.main:
            for event in events:
                run.record(state.step, event.line())
        if verdict == "back":
            if ready.ranks.main:
                run.rewind(state.step)
            save(run.states, state, ready.about, ready.config.train.keep_checkpoints, write=ready.ranks.main)
        return verdict


def _first_weights(ready: Prepared) -> Mapping[str, torch.Tensor] | None:
    """What learns, as it was before training, where that costs little memory: adapters copied, all weights in the reference."""
    config = ready.config
    if config.trainable.kind != "full":
        return {name: parameter.detach().clone() for name, parameter in trained(ready.policy).items()}
    still = config.reference.bank is None and config.reference.kind not in MOVING
    if not still:
        return None
    frozen, (_, shift) = dict(ready.family.denoiser.named_parameters()), by_part(ready.policy)
    if shift is None:
        return frozen
    own = {f"shift.{name}": parameter.detach().clone() for name, parameter in shift.named_parameters()}
    return own | {f"denoiser.{name}": parameter for name, parameter in frozen.items()}


def ended(config: Config, state: State, run: RunDir) -> str:
    """Why the guard ended a run, what there is of it, and how to go on."""
    says = guard_report(config.guard.policy, read_lines(run.metrics))["says"]
    kept = (
        f"weights of step {state.good}, the last good state, are in {run.weights}" if state.good else "no weights are written"
    )
    return f"the guard ended the run; {kept}. {says} To go on as it is, resume with --set guard.policy=warn."


def sample_prompts(config: Config, ready: Prepared) -> list[str]:
    """What the run draws along the way: the configured prompts, else the first held-out ones."""
    from flowalign.data import prompts

    if config.sample.prompts:
        wanted = config.sample.prompts
        return prompts.read([wanted] if isinstance(wanted, str) else list(wanted), config.sample.count)
    source = ready.held_out or ready.train
    return list(source.cached.prompts[: config.sample.count])


def draw_samples(config: Config, ready: Prepared, run: RunDir, prompts: list[str], step: int, progress: bool) -> None:
    """Pictures of the policy as it is, from seeds that stay the same over the run."""
    side = config.data.resolution
    settings = SamplerSettings(
        steps=config.sample.steps, guidance=config.sample.guidance, precision=config.train.precision, height=side, width=side
    )
    seeds = [config.sample.seed + index for index in range(len(prompts))]
    weights: list[dict[str, float]] | None = None
    under = even_and_corners(config.steer) if config.steer else []
    if config.users is not None:
        under = in_turn(ready.train.users, config.users.new)
    if under:  # each prompt under several weights, from one seed
        few = max(1, len(prompts) // len(under))
        seeds = [seed for seed in seeds[:few] for _ in under]
        prompts, weights = [prompt for prompt in prompts[:few] for _ in under], under * few
    size = config.sample.batch_size
    with ready.whole() as denoiser:
        for part, policy in [] if denoiser is None else parts(run, denoiser):
            learned, shift = by_part(policy)
            folder, pipeline = part.samples / f"step-{step:08d}", ready.family.pipeline(learned)
            telling = _telling(ready, shift)
            if telling is not None:
                telling.attach(pipeline)
            write_images(folder, pipeline, prompts, seeds, settings, weights=weights, batch_size=size, progress=progress)
            if telling is not None:
                telling.detach(pipeline)


def _telling(ready: Prepared, shift: Any) -> Telling | None:
    """What tells a pipeline of the policy what the policy is told beside the prompt."""
    if ready.config.steer is not None:
        return Steering(ready.config.steer, shift)
    return None if ready.config.users is None else Personal(_named(ready), shift)


def _named(ready: Prepared) -> Users:
    """The section users with everybody's names."""
    users = ready.config.users or Users()
    return users.model_copy(update={"names": ready.train.users})


def parts(run: RunDir, policy: nn.Module) -> list[tuple[RunDir, nn.Module]]:
    """Each policy with the folder of its weights and pictures: the run's own, or one for each type of annotator."""
    policies = by_type(policy)
    if len(policies) == 1:
        return [(run, policy)]
    return [(RunDir(run.types / str(place)), each) for place, each in enumerate(policies)]


def _made(pipeline: Any) -> dict[str, Any]:
    """What opens a checkpoint like this one: its class, and the parts that it wants to be told are not there."""
    optional = type(pipeline)._optional_components
    absent = [name for name, part in pipeline.components.items() if part is None and name not in optional]
    return {"pipeline": type(pipeline).__name__, "absent": absent}


def write_weights(config: Config, ready: Prepared, run: RunDir, policy: nn.Module) -> list[Path]:
    """What was learned, for others to load, and who is of which type of annotator; returns the run folders that hold it."""
    family, written = ready.family, []
    for part, each in parts(run, policy):
        write_text(part.config, dump(config))
        learned, shift = by_part(each)
        beside = {STEER: write_steering(config.steer, shift)} if config.steer is not None else {}
        if config.users is not None:
            beside = {USERS: write_users(_named(ready), shift), **kept_lora(config.users)}
        pipeline = family.pipeline(learned)
        export(learned, config.trainable.kind, pipeline, family.component, part.weights, beside)
        part.write_json(MADE, _made(pipeline))
        written.append(part.path)
    if ready.annotators is not None:
        run.write_json("annotators.json", ready.annotators.table())
        written.append(run.path)
    return written
