"""Training a field in a run folder, whatever its pairs are: what `runs.flows` does for pictures, and Python for tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.data.batch import Batch
from flowalign.device import open_accelerator
from flowalign.errors import ConfigError
from flowalign.flow.arrays import ArrayPairs
from flowalign.flow.field import Field, save_field
from flowalign.flow.matching import MatchingStep
from flowalign.flow.settings import Match, Train
from flowalign.report.page import read_lines
from flowalign.rng import Keyed
from flowalign.runs.folders import fresh, newest
from flowalign.train.checkpoint import State, load, states, step_of
from flowalign.train.loop import Hooks, fit
from flowalign.train.optimizer import make_optimizer
from flowalign.train.ranks import Ranks
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import trained
from flowalign.train.zero import by_zero


@dataclass(frozen=True)
class Material:
    """What a field is trained on."""

    batches: Callable[[int], Iterator[Batch]]
    """This rank's micro-batches from a place in the endless sequence of comparisons."""
    held_out: Callable[[int], Iterator[Batch]] | None
    """Every held-out comparison once, at one of its draws."""
    num_chosen: int = 1
    about: Mapping[str, object] = field(default_factory=dict)
    """What a saved state must agree with, besides the settings."""


def train_field(
    accelerator: Accelerator,
    model: Field,
    material: Material,
    cfg: Train,
    match: Match,
    run: RunDir,
    *,
    context_dropout: float = 0.0,
    begin: Callable[[], None],
    progress: bool = True,
) -> tuple[bool, float]:
    """From the newest saved state to the last step; whether it got there, and the seconds. The field has its averaged weights.

    begin: writes what the folder says of the run; called once a saved state was accepted, in the process that writes.
    Raises CheckpointError for a state that belongs to other settings, NonFiniteError as `fit` does, and ConfigError under FSDP
    and DeepSpeed.
    """
    if accelerator.is_fsdp2 or by_zero(accelerator):
        raise ConfigError("a flow's field is small and is not sharded; use configs/accelerate/ddp.yaml.")
    ranks = Ranks(accelerator, cfg.timeout)
    model.to(accelerator.device)
    if model.null is not None:
        model.null.requires_grad_(context_dropout > 0)  # it would wait for a gradient that never comes
    parameters = trained(model)
    optimizer = make_optimizer(cfg, list(parameters.values()), accelerator.device)
    called = torch.compile(model) if cfg.compile else model
    called, optimizer = accelerator.prepare(called, optimizer)
    accelerator.unwrap_model(called, keep_fp32_wrapper=False)
    step = MatchingStep(
        called, accelerator.device, accelerator.autocast, match.coupling, match.sigma, context_dropout, material.num_chosen
    )
    ema = {name: parameter.detach().clone() for name, parameter in parameters.items()} if cfg.ema else None
    state = State(parameters, optimizer, ema, accelerator.scaler)
    about: dict[str, object] = {
        "pairs_per_step": cfg.batch_size * cfg.accumulation * ranks.count,
        "match": match.model_dump(mode="json"),
        "context_dropout": context_dropout,
        "train": cfg.model_dump(mode="json", include={"seed", "precision", "optimizer"}),
        **material.about,
    }
    found = states(run.states)
    ranks.agree({"finished steps": step_of(found[-1]) if found else 0, **about})
    if found:
        load(found[-1], state, about)
    if ranks.main:  # only now: a resume that is refused leaves the folder as it was
        begin()
        run.rewind(step_of(found[-1]) if found else -1)

    def record(number: int, values: dict[str, float]) -> None:
        if ranks.main:
            run.record(number, values)
        accelerator.log(values, step=number)

    fixed = MatchingStep(model, accelerator.device, accelerator.autocast, sigma=match.sigma, num_chosen=material.num_chosen)
    held_out = material.held_out
    validate = None if held_out is None else lambda: validation(fixed, held_out, cfg)
    started = time.perf_counter()
    finished = fit(
        accelerator,
        called,
        state,
        material.batches,
        step,
        cfg,
        Hooks(record, validate),
        run.states,
        about,
        doing="matching",
        progress=progress,
    )
    if finished and ema is not None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(ema[name])
    ranks.wait()
    return finished, time.perf_counter() - started


@torch.no_grad()
def validation(step: MatchingStep, held_out: Callable[[int], Iterator[Batch]], cfg: Train) -> dict[str, float]:
    """Mean metrics of held-out comparisons at fixed (s, noise) draws; every process computes all of them."""
    rng, sums, count = Keyed(cfg.seed + 1), dict[str, torch.Tensor](), 0
    for draw in range(cfg.validation_draws):
        for batch in held_out(draw):
            _, metrics = step(batch, rng)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.double().sum().cpu()
            count += len(batch)
    return {name: float(value) / count for name, value in sorted(sums.items())}


def fit_field(
    model: Field,
    pairs: ArrayPairs,
    folder: str | Path,
    cfg: Train,
    match: Match,
    *,
    held_out: ArrayPairs | None = None,
    context_dropout: float = 0.0,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a field, in place, on pairs in memory; `folder` becomes a run folder with its weights.

    Raises ConfigError where the folder holds a run and `resume` is not set, or it has more steps than `cfg` says.
    """
    run = RunDir(Path(folder))
    fresh(run, resume, cfg.steps)
    accelerator = open_accelerator(cfg, run.path)

    def batches(position: int) -> Iterator[Batch]:
        return pairs.batches(
            cfg.seed,
            cfg.batch_size,
            position,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

    fixed = None if held_out is None else lambda draw: held_out.sequential(cfg.batch_size, draw)
    material = Material(batches, fixed, about={"data": {"comparisons": len(pairs)}})
    finished, seconds = train_field(
        accelerator,
        model,
        material,
        cfg,
        match,
        run,
        context_dropout=context_dropout,
        begin=lambda: run.write_environment(accelerator.device),
        progress=progress,
    )
    if finished and accelerator.is_main_process:
        save_field(model, run.weights)
    last = last_metrics(run) if accelerator.is_main_process else {}
    said = f"field in {run.weights}" if finished else f"stopped; continue in {run.path} with resume"
    return {"run": str(run.path), "finished": finished, "seconds": seconds, "metrics": last, "summary": said}


def last_metrics(run: RunDir) -> dict[str, float]:
    """The newest value of every metric."""
    return {name: value for name, value in newest(read_lines(run.metrics)).items() if name != "step"}
