"""Runs in processes that a test can kill. Not a test: `python forks.py kill|ranks ...`; imports are paid for once, runs fork.

kill CONFIG KILLS SEED    align again and again, killed at random moments, then once to the end
ranks CONFIG COUNT PORT   align, with COUNT processes; likewise lost, hung, unlike, apart, back, keep, and fill, see there
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign import config, runs
from flowalign.align import bank
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch
from flowalign.rng import Keyed
from flowalign.runs import training
from flowalign.setup import prepare
from flowalign.train.checkpoint import State, go_back
from flowalign.train.loop import Verdict
from flowalign.watch import Recorder

torch.set_num_threads(1)  # a pool of threads would not survive a fork

CHANGES = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1}
"""Events with which Python tells of a change to a folder, and how many paths they name first; see also open."""


def fork(work: Callable[[], object]) -> int:
    """Start `work` in a child that ends with it; returns the child's id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(settings: config.Config, kills: int, seed: int) -> int:
    """SIGKILL somewhere after a random number of new metric lines; prints how many steps were there each time."""
    dice, metrics = random.Random(seed), Path(settings.output) / "metrics.jsonl"
    for _ in range(kills):
        child = fork(lambda: runs.align(settings, resume=True, progress=False))
        before, wanted, ended = lines(metrics), dice.randint(0, 3), 0
        while abs(lines(metrics) - before) < wanted and not ended:
            time.sleep(0.001)
            ended, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(dice.random() * 0.2)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            print("killed" if os.WIFSIGNALED(status) else "ended", sorted(p.name for p in metrics.parent.glob("state/*")))
    _, status = os.waitpid(fork(lambda: runs.align(settings, resume=True, progress=False)), 0)
    return os.waitstatus_to_exitcode(status)


def ranks(settings: config.Config, count: int, port: int, before: Callable[[int], object] = lambda index: None) -> int:
    """What torchrun does: one process per rank, told by the environment who it is; runs go on where they were.

    `before(index)` is called in each process first. A process that was killed counts as exit code 0 here.
    """

    def rank(index: int) -> object:
        os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
        changed = before(index)
        return runs.align(changed if isinstance(changed, config.Config) else settings, resume=True, progress=False)

    children = [fork(lambda index=index: rank(index)) for index in range(count)]  # type: ignore[misc]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def lost(settings: config.Config, count: int, port: int) -> int:
    """The last process is killed in the middle of step 4, of which it had done one of two micro-steps."""

    def before(index: int) -> None:
        calls, step = iter(range(100)), PreferenceStep.__call__

        def counted(self: PreferenceStep, *arguments: Any) -> Any:
            out = step(self, *arguments)
            if torch.is_grad_enabled() and next(calls) == 7:  # not while validating
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        if index == count - 1:
            PreferenceStep.__call__ = counted  # type: ignore[method-assign]

    return ranks(settings, count, port, before)


def back(settings: config.Config, count: int, port: int) -> int:
    """In a folder beside; after step 4 the guard takes the run back to step 2, once."""

    def before(index: int) -> config.Config:
        judge, turns = Recorder.judge, iter(range(1))

        def judged(self: Recorder, state: State, broken: bool) -> Verdict:
            verdict = judge(self, state, broken)
            if state.step == 4 and next(turns, None) is not None:
                state.good = 2
                go_back(self._run.states, state, self._ready.about, self._ready.ranks)
                if self._ready.ranks.main:
                    self._run.rewind(state.step)
                return "back"
            return verdict

        Recorder.judge = judged  # type: ignore[method-assign]
        return settings.model_copy(update={"output": f"{settings.output}-back"})

    return ranks(settings, count, port, before)


def hung(settings: config.Config, count: int, port: int) -> int:
    """The last process stops answering after it has prepared everything, and ends only much later."""

    def before(index: int) -> None:
        if index == count - 1:
            training._train = lambda *_: time.sleep(30) or os._exit(0)  # type: ignore[func-returns-value]

    return ranks(settings, count, port, before)


def unlike(settings: config.Config, count: int, port: int) -> int:
    """The last process was given another learning rate."""
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": 0.5})})
    return ranks(settings, count, port, lambda index: other if index == count - 1 else None)


def apart(settings: config.Config, count: int, port: int) -> int:
    """The run that nothing happens to, in a folder beside; processes list what they make, move or remove in it."""
    own = settings.model_copy(update={"output": f"{settings.output}-apart"})

    def before(index: int) -> config.Config:
        listed = os.open(f"{own.output}-{index}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def audit(event: str, given: tuple[Any, ...]) -> None:
            if event in CHANGES or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                for path in given[: CHANGES.get(event, 1)]:
                    if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(f"{own.output}/"):
                        os.write(listed, f"{event} {os.fsdecode(path)}\n".encode())

        sys.addaudithook(audit)
        return own

    return ranks(settings, count, port, before)


def keep(settings: config.Config, count: int, port: int) -> int:
    """A copy of the run as it lies there, in a folder beside."""
    shutil.copytree(settings.output, f"{settings.output}-kept")
    return 0


def fill(settings: config.Config, count: int, port: int, name: str = "fill", dies: int | None = None) -> int:
    """Get ready, with a bank in parts of two batches and a cache folder beside the one named; processes list what they compute.

    The last one is killed when it has computed `dies` batches.
    """

    def before(index: int) -> config.Config:
        bank.PART = 2 * settings.train.batch_size
        listed, own = Path(f"{settings.output}-{name}-{index}.txt"), PreferenceStep.for_bank

        def computed(self: PreferenceStep, batch: Batch, rng: Keyed) -> tuple[torch.Tensor, torch.Tensor]:
            if index == count - 1 and lines(listed) == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            with listed.open("a") as file:
                print(f"{len(batch.positions)} {batch.draws[0]} {batch.positions[0]}", file=file)
            return own(self, batch, rng)

        def filled(given: config.Config, accelerator: Accelerator, *_: Any) -> tuple[bool, float]:
            prepare(given, accelerator, progress=False)
            return False, 0.0

        PreferenceStep.for_bank = computed  # type: ignore[method-assign]
        training._run = filled
        data = settings.data.model_copy(update={"cache": f"{settings.data.cache}-{name}"})
        return settings.model_copy(update={"data": data, "output": f"{settings.output}-{name}"})

    return ranks(settings, count, port, before)


if __name__ == "__main__":
    names, path, first, second = sys.argv[1:]
    commands = {"kill": kill, "ranks": ranks, "lost": lost, "hung": hung, "unlike": unlike, "apart": apart, "back": back}
    commands |= {"keep": keep, "fill": fill}
    commands["fill_lost"] = partial(fill, name="fill_lost", dies=3)
    commands["fill_rest"] = partial(fill, name="fill_rest")
    for place, name in enumerate(names.split(",")):  # one after the other, in one process that has imported everything
        print(name, commands[name](config.load(path), int(first), int(second) + place), flush=True)
