"""A run's LoRA beside others in the denoiser of a pipeline, and taken out again without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flowalign.errors import CheckpointError, reason
from flowalign.families.loading import FAILURES, LORA, LoraRun, add_lora


def join_lora(denoiser: Any, folder: Path, component: str) -> Callable[[], None] | None:
    """Have the LoRA of a folder of weights applied beside those that are; returns what undoes it, None if it already was.

    Loading makes an adapter the only one that is applied, so those before it are asked for again, as strong as they were. A
    LoRA that is there already, whoever loaded it, is not loaded twice. Raises CheckpointError.
    """
    if not (folder / LORA).is_file():
        return None
    before, name = _applied(denoiser), _name_of(denoiser, folder / LORA, component)
    if name in before:
        return None
    loaded = name is None
    if name is None:
        name = add_lora(denoiser, LoraRun(folder, "the pipeline's checkpoint", None, None), component)
    denoiser.set_adapter([*before, name])
    own = denoiser.peft_config[name]

    def undo() -> None:
        there = getattr(denoiser, "peft_config", None) or {}
        if there.get(name) is not own:  # somebody took it away, and may have given its name to another
            return
        if loaded and len(there) == 1:
            denoiser.unload_lora()  # with the layers that held it
            return
        kept = [each for each in _applied(denoiser) if each != name]
        if loaded:
            denoiser.set_adapter([each for each in there if each != name])  # or it would choose and warn
            denoiser.delete_adapters(name)
        denoiser.set_adapter(kept)

    return undo


def _applied(denoiser: Any) -> list[str]:
    """Names of the adapters that count in what a denoiser says."""
    if not getattr(denoiser, "peft_config", None):
        return []
    found = denoiser.active_adapters()
    return [found] if isinstance(found, str) else list(found or ())


def _name_of(denoiser: Any, file: Path, component: str) -> str | None:
    """The adapter that holds what the file does; None if none does. Raises CheckpointError."""
    names = list(getattr(denoiser, "peft_config", None) or ())
    if not names:
        return None
    from peft import get_peft_model_state_dict

    try:
        wanted = {name.removeprefix(f"{component}."): tensor for name, tensor in load_file(file).items()}
    except FAILURES as error:
        raise CheckpointError(f"{file} cannot be read ({reason(error)}); copy the run's weights again.") from error
    for name in names:
        own = get_peft_model_state_dict(denoiser, adapter_name=name)
        # An offloaded one holds no values between two calls.
        if own.keys() == wanted.keys() and all(t.is_meta or torch.equal(wanted[key].to(t), t) for key, t in own.items()):
            return name
    return None
