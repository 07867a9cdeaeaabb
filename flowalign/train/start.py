"""Weights of an earlier run from which training begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowalign.errors import CheckpointError, ConfigError, reason
from flowalign.families.base import Family
from flowalign.families.loading import FAILURES, LORA, USERS, digest, find_lora
from flowalign.families.steer import STEER, load_steering
from flowalign.sections import Model
from flowalign.settings import Steer, Trainable, Users


@dataclass(frozen=True)
class Start:
    """What a policy is made equal to before its first step."""

    source: str
    """As the user wrote it."""
    kind: str
    """lora: adapters; full: all weights."""
    tensors: Mapping[str, Tensor]
    """float32; none where only the settings were read."""
    fingerprint: str
    steer: Mapping[str, Tensor] = field(default_factory=dict)
    """What the network holds that steers the policy; none where there is none, or where it begins anew."""

    @torch.no_grad()
    def into(self, policy: nn.Module) -> None:
        """Set what learns, or all weights, in place. Raises ConfigError for another rank, other layers, another model."""
        own: Mapping[str, Tensor] = get_peft_model_state_dict(policy) if self.kind == "lora" else policy.state_dict()
        given = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        different = sorted(name for name in given.keys() | own.keys() if given.get(name) != _shape(own.get(name)))
        if given and different:
            name = different[0]
            raise ConfigError(
                f"trainable.start {self.source} does not fit: {name} is {given.get(name, 'not there')} in it and "
                f"{_shape(own.get(name)) or 'not there'} here; take the rank, targets and model that it was trained with."
            )
        for name, tensor in self.tensors.items():
            own[name].copy_(tensor)  # of the policy's own storage


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def read_start(
    trainable: Trainable,
    model: Model,
    family: Family,
    steer: Steer | None = None,
    users: Users | None = None,
    *,
    weights: bool = True,
) -> Start:
    """What `trainable.start` names, for a policy of `family` that is steered so; without `weights` no whole model is read.

    Raises ConfigError for a run of another kind, scale or model, steered otherwise, or whose users would be forgotten,
    CheckpointError for what cannot be read.
    """
    if users is not None and _holds(str(trainable.start), USERS):
        raise ConfigError(
            f"trainable.start {trainable.start} knows users of its own, who would begin anew here; take one more in with "
            "flowalign adapt, or set trainable.start=null."
        )
    found = _read(trainable, model, family, weights)
    told = _steering(found.source, steer)
    if not told:
        return found
    prints = {name: _digest(each) for name, each in sorted(told.items())}
    return replace(found, steer=told, fingerprint=digest(found.fingerprint, prints))


def _steering(source: str, steer: Steer | None) -> Mapping[str, Tensor]:
    """What an earlier run's network holds for a policy that is steered so; nothing where either is not."""
    if steer is None or not _holds(source, STEER):
        return {}
    found = load_steering(source)
    theirs, ours = (each.model_dump(exclude={"dropout"}) for each in (found.settings, steer))
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        name = different[0]
        raise ConfigError(
            f"trainable.start {source} was steered with {name} {theirs[name]!r} and steer.{name} is {ours[name]!r}; set what "
            "it was trained with, or trainable.start=null."
        )
    return {} if found.shift is None else found.shift.state_dict()


def _holds(source: str, file: str) -> bool:
    """Whether a run has saved a file beside its weights."""
    folder = Path(source).expanduser()
    return any((each / file).is_file() for each in (folder, folder / "weights"))


def _read(trainable: Trainable, model: Model, family: Family, weights: bool) -> Start:
    source = str(trainable.start)
    run = find_lora(source)
    if (run is None) is (trainable.kind == "lora"):
        held = "no LoRA" if run is None else "a LoRA"
        raise ConfigError(
            f"trainable.start {source} holds {held} and trainable.kind is {trainable.kind!r}; name a run of the same kind, or "
            "set trainable.start=null."
        )
    if run is None and trainable.kind == "none":  # whose run writes no weights of the denoiser, so that these would be lost
        raise ConfigError(
            f"trainable.start {source} holds the denoiser's whole weights, and trainable.kind none trains nothing of it; set "
            "trainable.start=null and model.checkpoint to the folder of these weights."
        )
    if run is None:
        make = type(family).load if weights else type(family).outline
        denoiser = make(source, dtype=torch.float32).denoiser
        return Start(source, "full", denoiser.state_dict() if weights else {}, digest(denoiser) if weights else "")
    if not _same(run.base, model.checkpoint):
        raise ConfigError(
            f"trainable.start {source} is a LoRA of {run.base} and model.checkpoint is {model.checkpoint}; adapters fit the "
            "model they were trained on only."
        )
    path, prefix = run.weights / LORA, f"{family.component}."
    try:
        found = load_file(path)
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except FAILURES as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); name the folder of a finished LoRA run.") from error
    rank = about.get(f"{prefix}r", trainable.rank)
    alpha, wanted = about.get(f"{prefix}lora_alpha", rank), trainable.rank if trainable.alpha is None else trainable.alpha
    if alpha / rank != wanted / trainable.rank:
        raise ConfigError(
            f"trainable.start {source} applies its adapters {alpha / rank:g} times and trainable.alpha over trainable.rank is "
            f"{wanted / trainable.rank:g}; set trainable.rank={rank} and trainable.alpha={alpha:g}."
        )
    tensors = {name.removeprefix(prefix): tensor.float() for name, tensor in found.items()}
    return Start(source, "lora", tensors, digest({name: _digest(each) for name, each in sorted(tensors.items())}))


def _digest(tensor: Tensor) -> str:
    """Of its bytes."""
    return hashlib.blake2b(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _same(one: str, other: str) -> bool:
    """Whether two names are of one checkpoint, as far as names can say."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
