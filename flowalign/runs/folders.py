"""Verbs about what lies on disk: run folders, exports, caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from flowalign import config as configuration
from flowalign.data.cache import clear, usage
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.loading import LORA
from flowalign.files import atomic, check_file, check_folder
from flowalign.flow.settings import FlowConfig
from flowalign.improve_settings import ImproveConfig
from flowalign.report.card import write_card
from flowalign.report.improve import write_improve_page
from flowalign.report.page import write_report
from flowalign.settings import Config
from flowalign.sources import cache_folder
from flowalign.train.checkpoint import states, step_of
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import kohya

IMPROVED = "improve.json"
"""What the folder of an improvement loop holds, and no other."""


def fresh(run: RunDir, resume: bool, steps: int | None = None, *, flag: str = "--output", goes_on: bool = True) -> None:
    """Raises ConfigError for what is no folder, and one that is in use, unless the run in it is to go on, and has no more steps
    than `steps`.

    flag: of the command line that gives the folder. goes_on: whether what writes it can go on with it at all.
    """
    check_folder(run.path, flag.removeprefix("--"))
    saved = states(run.states)
    if resume and saved and steps is not None and step_of(saved[-1]) > steps:
        done = step_of(saved[-1])
        raise ConfigError(
            f"train.steps is {steps}, and {run.path} has trained {done} steps already, which are not taken back; set "
            f"train.steps={done} to finish with what there is, more to go on, or give another folder with {flag}."
        )
    if (run.config.exists() or saved) and not resume:
        again = "add --resume to continue that run, or " if goes_on else ""
        name = flag.removeprefix("--")
        raise ConfigError(
            f"{name} {run.path} already holds a run; allowed: an empty folder; {again}give another folder with {flag}."
        )


def stopped(run: RunDir, command: str) -> str:
    """What a run that was stopped says, and how it goes on: one that had not begun has no settings to go on by."""
    if not run.config.is_file():
        return "stopped before the first step; what was computed is kept in the cache. Continue with the same command."
    saved = states(run.states)
    where = f"step {step_of(saved[-1])} is saved" if saved else "no step is saved yet"
    return f"stopped; {where}. Continue with: flowalign {command} {run.path} --resume"


def check_no_loop(run: Path) -> None:
    """Raises CheckpointError for the folder of a loop, which is no run of its own but holds one a round."""
    if (run / "rounds").is_dir():
        aligned = sorted(run.glob("rounds/*/align"))
        other = f"the run of one of its rounds, such as {aligned[-1]}" if aligned else "the folder of a run"
        raise CheckpointError(f"{run} is the folder of a loop of rounds; give {other}.")


def newest(lines: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The last value of every metric of a metrics file."""
    return {name: value for line in lines for name, value in line.items()}


def judges_of(run: str, kind: type[Config] | type[FlowConfig]) -> Path:
    """The folder of judges that a run's configuration names. Raises ConfigError where there is none."""
    path = Path(run) / "config.yaml"
    if (Path(run) / IMPROVED).is_file():
        folder = configuration.load_tree(ImproveConfig, path).evaluate.judges
    else:
        folder = configuration.load_tree(kind, path).judges if path.is_file() else None
    if folder is None:
        raise ConfigError(f"no judges are given and {run} names none; add --judges FOLDER, such as samples/emoji/judges.")
    return Path(folder)


def report(run: Path) -> dict[str, Any]:
    """Write the run's page, and the model card beside its weights, from what its folder holds."""
    if (run / IMPROVED).is_file():
        path = write_improve_page(run)
        return {"report": str(path), "summary": f"report: {path}"}
    path = write_report(run)
    if (run / "weights").is_dir():
        write_card(run)
    return {"report": str(path), "summary": f"report: {path}"}


def export_kohya(run: Path, out: Path | None = None) -> dict[str, Any]:
    """Write a run's LoRA, of a loop that of its best round, as one file in kohya's format, for A1111 and ComfyUI.

    Raises CheckpointError.
    """
    source = run / "weights" / LORA
    if not source.is_file():
        raise CheckpointError(f"{run} holds no weights/{LORA}; give the folder of a finished LoRA run.")
    kind = ImproveConfig if (run / IMPROVED).is_file() else Config
    settings = configuration.load_tree(kind, run / "config.yaml").trainable
    path = out or run / "weights" / "kohya.safetensors"
    check_file(path)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    with atomic(path) as temporary:
        save_file(kohya(load_file(source), alpha / settings.rank), temporary)
    return {"file": str(path), "summary": f"LoRA in kohya's format: {path}"}


def cache_list(folder: Path | None) -> dict[str, Any]:
    """What the cache holds, per encoder and per reference bank, and what killed processes left in it."""
    path = cache_folder(folder)
    found = usage(path)
    lines = [f"{store['store']}: {', '.join(_told(store))}" for store in found["stores"]]
    lines += [f"{name}: {_filled(found[name])}" for name in ("indices", "leftovers") if found[name]["entries"]]
    lines.append(f"{path}: {_filled(found)}")
    return {"folder": str(path), **found, "summary": "\n".join(lines)}


def cache_clear(folder: Path | None, fingerprint: str | None = None, kind: str | None = None) -> dict[str, Any]:
    """Delete what is cached, or only one kind of it, or what is of one encoder, denoiser or bank."""
    path = cache_folder(folder)
    freed = clear(path, fingerprint, kind)
    return {"folder": str(path), "freed": freed, "summary": f"{freed / 2**20:.1f} MiB freed in {path}"}


def _filled(found: Mapping[str, Any]) -> str:
    return f"{found['entries']} entries, {found['bytes'] / 2**20:.1f} MiB"


def _told(store: Mapping[str, Any]) -> Iterable[str]:
    """About a store, for people; of banks that earlier versions filled less is known."""
    yield _filled(store)
    yield f"used {store['used'][:10]}"
    if store["checkpoint"]:
        yield store["checkpoint"]
    if "draws" in store:
        yield f"{store['pairs']} pairs at {store['draws']} draws, {store['precision']}"
