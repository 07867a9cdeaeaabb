"""The only training loop. It knows steps, not algorithms: a step turns a batch into an unreduced loss and metrics."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from flowalign.data.batch import Batch
from flowalign.errors import NonFiniteError
from flowalign.rng import Keyed
from flowalign.sections import Loop
from flowalign.train.checkpoint import State, save
from flowalign.train.optimizer import make_descent
from flowalign.train.ranks import Ranks

Step = Callable[[Batch, Keyed], tuple[Tensor, dict[str, Tensor]]]
T = TypeVar("T")
Verdict = Literal["on", "good", "back", "stop"]
"""Go on; go on, and a state that is saved now is a good one; the state was taken back to an earlier step; end the run, as it is
or as it was at the step that it was taken back to."""


@dataclass(frozen=True)
class Hooks:
    """What a run wants done along the way. Each gets the number of finished steps."""

    record: Callable[[int, dict[str, float]], None]
    """Write one line of metrics."""
    validate: Callable[[], dict[str, float]] | None = None
    sample: Callable[[int], None] | None = None
    """Called in every process: weights in shards are put together for it."""
    after: Callable[[int], None] | None = None
    """After every step, before anything is saved; it must not wait for the device."""
    refresh: Callable[[], None] | None = None
    """Every `log_every` steps, when the device has been waited for: what the step learns from its own batches."""
    judge: Callable[[bool], Verdict] = lambda broken: "on"
    """After every step that wrote metrics, alike in all processes; broken: a metric was not finite, and is not recorded. It may
    change `state.rate`."""


def learning_rate(step: int, cfg: Loop) -> float:
    """Rate of step `step` (0-based): linear warm-up over `warmup_steps`, then constant, linear or cosine decay to 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[cfg.schedule]
    return cfg.learning_rate * factor


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    state: State,
    batches: Callable[[int], Iterator[Batch]],
    step: Step,
    cfg: Loop,
    hooks: Hooks,
    states: Path,
    about: dict[str, object],
    *,
    doing: str = "aligning",
    progress: bool = True,
) -> bool:
    """Train from `state.step` to `cfg.steps`; return False where SIGINT, SIGTERM or `judge` ended it early, after saving.

    `batches(position)` yields this rank's micro-batches from a place in the run's endless sequence of comparisons.
    `doing` stands before the progress bar.
    Metrics are summed on the device and read once every `log_every` steps, averaged over accumulation and ranks.
    Raises NonFiniteError before a broken state could be saved.
    """
    rng, ranks = Keyed(cfg.seed), Ranks(accelerator, cfg.timeout)
    descent = make_descent(accelerator, model, state, cfg.clip_norm)
    parameters = list(state.parameters.values())
    per_step = cfg.batch_size * cfg.accumulation * accelerator.num_processes
    stream = batches(state.step * per_step)
    sums: dict[str, Tensor] = {}
    count, since, clock = 0, 0.0, time.perf_counter()

    def flush() -> NonFiniteError | None:
        """Read the sums back (the only wait for the device) and write them, unless one is not finite."""
        nonlocal sums, count, since, clock
        if not count:
            return None
        names = sorted(sums)
        means = accelerator.reduce(torch.stack([sums[name] for name in names]) / count, "mean").tolist()
        values = dict(zip(names, means, strict=True))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            return NonFiniteError(
                f"{', '.join(broken)} became NaN or infinite between steps {state.step - count} and {state.step}; the last "
                "saved state is whole: lower train.learning_rate or use train.precision=fp32, then run again."
            )
        elapsed = time.perf_counter() - clock - since
        values |= {
            "lr": state.rate * learning_rate(state.step - 1, cfg),
            "pairs_per_second": count * per_step / max(elapsed, 1e-9),
        }
        hooks.record(state.step, {f"train/{name}": value for name, value in values.items()})
        accuracy = f"  accuracy {values['rewards/accuracies']:.2f}" if "rewards/accuracies" in values else ""
        bar.set_postfix_str(f"loss {values['loss']:.3f}{accuracy}")
        sums, count, since, clock = {}, 0, 0.0, time.perf_counter()
        return None

    def aside(work: Callable[[], T]) -> T:
        """Do something that is not training, off the clock of pairs per second."""
        nonlocal since
        started = time.perf_counter()
        done = work()
        since += time.perf_counter() - started
        return done

    def validate() -> None:
        if hooks.validate is not None:
            model.eval()
            hooks.record(state.step, {f"eval/{name}": value for name, value in hooks.validate().items()})
            model.train()

    def sample() -> None:
        if hooks.sample is not None:
            model.eval()
            hooks.sample(state.step)
            model.train()

    def checkpoint() -> None:
        if broken := flush():
            raise broken
        save(states, state, about, cfg.keep_checkpoints, write=ranks.main)

    verdict: Verdict = "on"
    if state.step == 0 and state.good is None:  # a good state of step 0 was saved after this
        aside(validate)
        verdict = hooks.judge(False)
        if verdict == "good":
            state.good = 0
            aside(checkpoint)
    model.train()
    shown = progress and accelerator.is_main_process
    bar = tqdm(total=cfg.steps, initial=state.step, desc=doing, unit="step", disable=not shown)
    broken: NonFiniteError | None = None
    with _stop_signals() as stopped:
        # A signal reaches processes at different times; all of them must leave after the same step.
        while verdict != "stop" and state.step < cfg.steps and not ranks.any(stopped()):
            rate = state.rate * learning_rate(state.step, cfg)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            for micro in range(cfg.accumulation):
                last = micro == cfg.accumulation - 1
                with descent.micro_step(last):
                    loss, metrics = step(next(stream), rng)
                    # accelerate divides by the accumulation it was told of; here that is 1, so divide once, by hand.
                    descent.backward(loss.mean() / cfg.accumulation, last)
                for name, value in metrics.items():
                    mean = value.mean() / cfg.accumulation
                    sums[name] = sums[name] + mean if name in sums else mean
            norm = descent.step()
            if accelerator.scaler is None:  # with fp16 an overflowing step is skipped by the scaler, and is no error
                sums["grad_norm"] = sums["grad_norm"] + norm if "grad_norm" in sums else norm
            if state.ema is not None:
                with torch.no_grad():
                    torch._foreach_lerp_(list(state.ema.values()), parameters, 1 - float(cfg.ema or 0))
            state.step += 1
            if hooks.after is not None:
                hooks.after(state.step)
            count += 1
            bar.update()
            ended = state.step == cfg.steps
            logs, validates, samples, saves = (
                ended or (every is not None and state.step % every == 0)
                for every in (cfg.log_every, cfg.validate_every, cfg.sample_every, cfg.save_every)
            )
            broken = flush() if logs or saves else None
            if hooks.refresh is not None and state.step % cfg.log_every == 0 and not broken:
                hooks.refresh()
            if validates and not broken:
                aside(validate)  # before saving, so that a run resumed from here does not record it twice
            if logs or validates or saves:
                reached = state.step
                verdict = aside(partial(hooks.judge, broken is not None))
                if state.step < reached:
                    stream, bar.n, broken = batches(state.step * per_step), state.step, None
                    sums, count, since, clock = {}, 0, 0.0, time.perf_counter()
                if verdict == "stop":
                    break
                if verdict == "back":
                    continue
            if broken:
                raise broken
            if samples and not ended:
                aside(sample)
            if saves:
                state.good = state.step if verdict == "good" else state.good
                aside(checkpoint)
        finished = state.step == cfg.steps and verdict != "stop"
        if not finished and not broken:
            checkpoint()
    bar.close()
    return finished


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question the loop asks between steps; a second one interrupts at once."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
