"""Saved training state: everything a killed run needs to go on as if it had not been killed. Nothing is unpickled."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowalign.errors import CheckpointError
from flowalign.files import atomic_folder
from flowalign.train.ranks import Ranks, Sharded, differences, gathered, scattered
from flowalign.train.zero import Zero


@dataclass
class State:
    """What changes while training. `step` counts finished optimiser steps; the data position follows from it."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | Zero
    ema: dict[str, Tensor] | None
    scaler: torch.amp.GradScaler | None = None
    """Loss scale of fp16."""
    learned: dict[str, Tensor] = field(default_factory=dict)
    """What the step itself has learned, the same on every rank; restored in place."""
    step: int = 0
    rate: float = 1.0
    """What the learning rate is multiplied with."""
    good: int | None = None
    """Step of the newest state that was found good, which is kept however old it grows."""

    def tensors(self) -> dict[str, Tensor | Sharded]:
        """By the names of a state file; what lies in shards is put together by `gathered`, one at a time."""
        out: dict[str, Tensor | Sharded] = {f"parameter/{name}": each.detach() for name, each in self.parameters.items()}
        if self.ema is not None:
            out |= {f"ema/{name}": tensor for name, tensor in self.ema.items()}
        out |= {f"learned/{name}": tensor for name, tensor in self.learned.items()}
        for name, parameter in self.parameters.items():  # not of its `state_dict`, in which bitsandbytes hides blocks
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"optimizer/{key}/{name}"] = value if isinstance(value, Sharded) else torch.as_tensor(value)
        return out


def save(folder: Path, state: State, about: dict[str, object], keep: int, *, write: bool = True) -> Path:
    """Write `folder/step-NNNNNN` atomically, then drop all but the newest `keep` states and the good one.

    Every process of a run calls it, because tensors in shards are put together here; the one with `write` writes.
    """
    path = folder / f"step-{state.step:08d}"
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.tensors().items():
        whole = gathered(tensor).detach()
        if write:  # clones: safetensors refuses tensors that share memory, and a shared step counter is such a tensor
            tensors[name] = whole.cpu().contiguous().clone()
    if not write:
        return path
    scaler = state.scaler.state_dict() if state.scaler is not None else None
    with atomic_folder(path) as temporary:
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "about.json").write_text(json.dumps(_scalars(state) | {"scaler": scaler} | about, indent=1))
    for old in states(folder)[:-keep]:
        if step_of(old) != state.good:
            _drop(old)
    return path


def _drop(path: Path) -> None:
    """Delete a state; it is none from the first instant, so that no half of it is ever taken for one."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _scalars(state: State) -> dict[str, object]:
    return {"step": state.step, "rate": state.rate, "good": state.good}


def go_back(folder: Path, state: State, about: dict[str, object], ranks: Ranks) -> None:
    """Restore the good state, or where none is the newest, but for the rate; drop what was saved after it.

    Every process calls it.
    """
    saved = states(folder)
    step = step_of(saved[-1]) if state.good is None else state.good
    newer = [path for path in saved if step_of(path) > step]
    ranks.wait()  # until all have looked
    if ranks.main:
        for path in newer:
            _drop(path)
    rate = state.rate
    load(folder / f"step-{step:08d}", state, about)
    state.rate = rate


def states(folder: Path) -> list[Path]:
    """Complete states, oldest first. What a killed save left behind has another name and is not among them."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def step_of(path: Path) -> int:
    """Finished steps of one of `states`."""
    return int(path.name.removeprefix("step-"))


def load(path: Path, state: State, about: dict[str, object]) -> None:
    """Restore `state` in place. Raises CheckpointError where the saved state belongs to other parameters or settings."""
    try:
        saved = json.loads((path / "about.json").read_text())
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"the saved state {path} cannot be read ({error}); delete that folder and resume again."
        ) from error
    different = [f"{name} was {a} and is {b}" for name, a, b in differences(saved, json.loads(json.dumps(about)))]
    expected = {name for name in state.tensors() if not name.startswith("optimizer/")}
    found = {name for name in tensors if not name.startswith("optimizer/")}
    if different or expected != found:
        what = ", ".join(different) or f"{len(found)} parameters were saved and {len(expected)} are here"
        raise CheckpointError(
            f"the saved state {path} belongs to a run with other settings: {what}; allowed: resuming with the same "
            "configuration; change `output` to start a new run."
        )
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(scattered(tensors[f"parameter/{name}"], parameter))
        for name, tensor in (state.ema or {}).items():
            tensor.copy_(scattered(tensors[f"ema/{name}"], tensor))
        for name, tensor in state.learned.items():
            tensor.copy_(tensors[f"learned/{name}"])
    parts = isinstance(state.optimizer, Zero)  # it cuts its part out of whole tensors, wherever they are
    slots: dict[int, dict[str, Tensor | int]] = {}
    for index, (name, parameter) in enumerate(state.parameters.items()):
        mine = {k.split("/")[1]: v for k, v in tensors.items() if k.startswith("optimizer/") and k.split("/", 2)[2] == name}
        if mine:
            slots[index] = mine if parts else {key: _as_it_was(parameter, value) for key, value in mine.items()}
    groups = {} if parts else {"param_groups": state.optimizer.state_dict()["param_groups"]}
    state.optimizer.load_state_dict({"state": slots, **groups})
    if state.scaler is not None and saved.get("scaler"):
        state.scaler.load_state_dict(saved["scaler"])
    state.step, state.rate, state.good = saved["step"], saved["rate"], saved["good"]


def _as_it_was(parameter: nn.Parameter, value: Tensor) -> Tensor | int:
    """What an optimizer had for `parameter`: its count of steps, which bitsandbytes keeps as a Python number, or a tensor in
    the parameter's memory format: fused AdamW goes through both in the order they lie in memory."""
    if value.dtype == torch.int64 and not value.ndim:
        return int(value)
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(scattered(value, parameter))
