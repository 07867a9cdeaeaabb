"""Verbs that train, or say what training would take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign import config as configuration
from flowalign import probe
from flowalign.data.pairs import sequential
from flowalign.device import make_accelerator
from flowalign.errors import CollapseError
from flowalign.evaluate.guard import guard_report
from flowalign.files import write_text
from flowalign.plan.gpus import EFFICIENCY
from flowalign.plan.page import page
from flowalign.plan.predict import predict
from flowalign.report.page import read_lines
from flowalign.rng import Keyed
from flowalign.runs.folders import fresh, newest, report, stopped
from flowalign.settings import Config
from flowalign.setup import Prepared, prepare
from flowalign.sources import FIRST
from flowalign.train.checkpoint import State, load, states, step_of
from flowalign.train.loop import Hooks, fit
from flowalign.train.ranks import peers
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import trained
from flowalign.watch import Recorder, draw_samples, ended, sample_prompts, validation, write_weights


def align(config: Config, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Align a model as `config` says; the run folder `config.output` holds the result.

    With `resume` a run that was stopped or killed goes on from its last saved state, and ends as if it never had been.
    SIGINT and SIGTERM end it early after saving. Of several processes only the first writes, and has a summary.
    Raises ConfigError where the folder is in use and `resume` is not set, or it has more steps than `config` says, PeerError
    where another process is gone.
    """
    started = time.perf_counter()
    run = RunDir(Path(config.output))
    found = states(run.states)
    fresh(run, resume, config.train.steps)
    accelerator = make_accelerator(config, run.path)
    try:
        with peers(accelerator.num_processes):
            config = probe.resolved(config, accelerator, run, progress=progress)
            finished, seconds = _run(config, accelerator, run, found, progress)
    except KeyboardInterrupt:
        finished, seconds = False, 0.0
    result = {"run": str(run.path), "finished": finished, "seconds": time.perf_counter() - started}
    if not finished and not accelerator.is_main_process:
        return result | {"summary": None}
    if not finished:
        return result | {"summary": stopped(run, "align")}
    accelerator.end_training()
    if not accelerator.is_main_process:
        return result | {"summary": None}
    last = _last_metrics(lines := list(read_lines(run.metrics)))
    pairs = config.train.batch_size * config.train.accumulation * accelerator.num_processes * config.train.steps
    accuracy = last.get("eval/rewards/accuracies")
    held_out = f"held-out preference accuracy {accuracy:.2f}, " if accuracy is not None else ""
    weights = run.weights if run.weights.is_dir() else run.types
    return result | {
        "steps": config.train.steps,
        "seconds_training": seconds,
        "pairs_per_second": last.get("train/pairs_per_second"),
        "metrics": last,
        "guard": guard_report(config.guard.policy, lines),
        "summary": f"aligned on {pairs} pairs in {seconds:.0f} s: {held_out}weights in {weights}, "
        f"report in {run.path / 'report.html'}",
    }


def _run(config: Config, accelerator: Accelerator, run: RunDir, found: list[Path], progress: bool) -> tuple[bool, float]:
    """From the newest of the states found to the finished folder; whether it got there, and the seconds of training.

    Raises CollapseError where the guard ends the run; weights/ are those of the last good state then.
    """
    ready = prepare(config, accelerator, progress=progress)
    recorder = Recorder(ready, run)
    learned = ready.learned() | recorder.guard.tensors()
    state = State(trained(ready.policy), ready.optimizer, ready.ema, accelerator.scaler, learned)
    # What every process found and read: a folder that is not shared, or other files, would go unnoticed until the end.
    ready.ranks.agree({"finished steps": step_of(found[-1]) if found else 0, **ready.about})
    if found:
        load(found[-1], state, ready.about)
        if recorder.guard.stopped:
            raise CollapseError(ended(config, state, run))
    else:
        ready.at_start.self_test(ready.first_batch(), Keyed(config.train.seed))
        plain = replace(ready.step, policy=ready.policy, reference=ready.family.denoiser)  # single pairs: compile nothing
        few = islice(sequential(ready.train, 1), FIRST)
        plain.gains(few, list(trained(ready.policy).values()), Keyed(config.train.seed))
    if accelerator.is_main_process:  # only now: a resume that is refused leaves the folder as it was
        write_text(run.config, configuration.dump(config))
        run.write_environment(accelerator.device)
        run.write_json("data.json", ready.data)
        run.rewind(step_of(found[-1]) if found else -1)
    finished, seconds = _train(config, ready, state, run, recorder, progress)
    if finished:
        _finish(config, ready, state, run, progress)
    elif recorder.guard.stopped:
        if state.good:
            load(run.states / f"step-{state.good:08d}", state, ready.about)
            _finish(config, ready, state, run, progress)
        elif ready.ranks.main:
            report(run.path)
        raise CollapseError(ended(config, state, run))
    return finished, seconds


def _train(
    config: Config, ready: Prepared, state: State, run: RunDir, recorder: Recorder, progress: bool
) -> tuple[bool, float]:
    accelerator = ready.accelerator
    prompts = sample_prompts(config, ready)

    def sample(step: int) -> None:
        draw_samples(config, ready, run, prompts, step, progress)

    if state.step == 0 and prompts:
        sample(0)
    validate = (
        None
        if ready.held_out is None
        else lambda: validation(ready.full_step, ready.held_out, config, accelerator, ready.held_out_bank)
    )

    importance = ready.step.importance
    started = time.perf_counter()
    finished = fit(
        accelerator,
        ready.model,
        state,
        ready.batches,
        ready.full_step,
        config.train,
        Hooks(
            recorder.record,
            validate,
            sample if prompts else None,
            ready.after,
            importance.refresh if importance is not None else None,
            lambda broken: recorder.judge(state, broken),
        ),
        run.states,
        ready.about,
        progress=progress,
    )
    return finished, time.perf_counter() - started


def _finish(config: Config, ready: Prepared, state: State, run: RunDir, progress: bool) -> None:
    """Weights, last samples and report, from the averaged weights where there are any."""
    if state.ema is not None:
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.copy_(state.ema[name])
    ready.policy.eval()
    prompts = sample_prompts(config, ready)
    if prompts:
        draw_samples(config, ready, run, prompts, state.step, progress)
    with ready.whole() as denoiser:
        if denoiser is not None:
            for folder in write_weights(config, ready, run, denoiser):
                report(folder)
    ready.ranks.wait()


def _last_metrics(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The newest value of every metric but what the guard did."""
    return {name: value for name, value in newest(lines).items() if not name.startswith("guard/")}


def plan(
    config: Config,
    *,
    efficiency: float = EFFICIENCY,
    prices: Mapping[str, float] | None = None,
    comparisons: int | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """What `align` would train, hold, store and cost: a dry run without weights and pictures, see `plan.predict`."""
    found = predict(config, efficiency, prices or {}, comparisons, processes)
    return found | {"summary": page(found)}


def suggest_beta(
    config: Config, *, steps: int = probe.STEPS, target: float = probe.TARGET, progress: bool = True
) -> dict[str, Any]:
    """The β that suits a configuration's data and model, from a short probe on a copy, see `probe.suggest`."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config, Path(folder))
        found = probe.suggest(config, accelerator, steps=steps, target=target, progress=progress)
    said = f"{probe.table(found)}\n\nuse it: --set objective.beta={probe.rounded(found['beta']):g}"
    return found | {"summary": said if accelerator.is_main_process else None}
