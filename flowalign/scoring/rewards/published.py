"""Weights that others publish: fetched once, checked, and read without unpickling."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from torch import Tensor

from flowalign.errors import CheckpointError, reason
from flowalign.files import atomic

FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


def from_hub(repository: str, file: str) -> Path:
    """A file of a hub repository, from the hub's cache or downloaded. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except FAILURES as error:
        raise CheckpointError(
            f"{file} of {repository} is not in the hub's cache and cannot be downloaded ({reason(error)}); download it once "
            "while online, or give weights: FILE."
        ) from error


def from_address(address: str, sha256: str | None) -> Path:
    """A file of the web, from flowalign's cache or downloaded. Raises CheckpointError, also for a file of another sha256."""
    root = Path(os.environ.get("FLOWALIGN_CACHE") or Path.home() / ".cache" / "flowalign")
    path = root / "weights" / address.rpartition("/")[2]
    if not path.is_file():
        try:
            with urlopen(address, timeout=60) as answer:
                data = answer.read()
        except FAILURES as error:
            raise CheckpointError(
                f"{address} cannot be downloaded ({reason(error)}); download it once while online, or give weights: FILE."
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256:
            raise CheckpointError(
                f"{address} has the sha256 {found} and not {sha256}; get the file elsewhere and give weights: FILE."
            )
        with atomic(path) as temporary:
            temporary.write_bytes(data)
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a `.safetensors`, `.pth`, `.pt` or `.bin` file, and what it says of itself (safetensors only).

    Raises CheckpointError for a file that is not there, that holds code, or that holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise many kinds on files that are not theirs
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); give a file of weights.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds more than named tensors; give a file of weights.")
    return state, {}
