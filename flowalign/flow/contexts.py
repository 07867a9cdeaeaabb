"""What a flow is told about a picture: its prompt as a text encoder sees it, its class, or nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign import plugins
from flowalign.data.batch import Conditioning
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.base import Family
from flowalign.families.loading import detect_family
from flowalign.flow.matching import told
from flowalign.flow.settings import Model
from flowalign.flow.spaces import Space
from flowalign.rng import key

TOKENS = "prompt_embeds"
"""What families call the states of a prompt's tokens."""


class Contexts(ABC):
    """Prompts -> what a field is told, `[B, ...]`; a row depends on its own prompt only."""

    kind: str
    """As `FieldSettings.context`."""
    size: int
    """As `FieldSettings.context_size`."""
    fingerprint: str
    """Changes whenever contexts could."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """On the CPU."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What `open_contexts` needs to make them again; values for JSON."""

    @abstractmethod
    def release(self) -> None:
        """Drop from memory what `encode` needs; it comes back when asked for."""


class Light(Contexts):
    """Contexts that hold nothing worth dropping."""

    def release(self) -> None:
        return None


class Nothing(Light):
    """No prompts are read."""

    kind, size, fingerprint = "none", 0, "none"

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), dtype=torch.int64)

    def about(self) -> dict[str, Any]:
        return {"kind": "none"}


class Classes(Light):
    """Each of some prompts is a class; any other prompt is none of them."""

    kind = "class"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.size, self.fingerprint = len(self.names), f"classes-{key(*self.names):016x}"
        self._number = {name: number for number, name in enumerate(self.names)}

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self._number.get(prompt, -1) for prompt in prompts])

    def about(self) -> dict[str, Any]:
        return {"kind": "class", "names": list(self.names)}


class Prompts(Contexts):
    """States of the prompt's tokens `[B, L, D]` by the checkpoint's own text encoder."""

    kind = "tokens"

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        """Raises CheckpointError for one that cannot be loaded, or has no states of tokens."""
        self._model, self._device = model, device
        self._family: Family | None = None
        self.fingerprint = f"{TOKENS}-{self._open().fingerprint('prompts')}"
        self.size = self.encode([""]).shape[-1]

    def _open(self) -> Family:
        if self._family is None:
            model = self._model
            name = model.family
            if name == "auto":
                name = detect_family(model.checkpoint, revision=model.revision, variant=model.variant)
            kind = plugins.load("families", name)
            family: Family = kind.load(model.checkpoint, dtype=torch.float32, revision=model.revision, variant=model.variant)
            family.denoiser.to(self._device)
            self._family = family
        return self._family

    def encode(self, prompts: Sequence[str]) -> Tensor:
        tensors = self._open().encode_prompts(prompts).tensors
        if TOKENS not in tensors or tensors[TOKENS].dim() != 3:
            raise CheckpointError(
                f"{self._model.checkpoint} describes prompts by {', '.join(tensors)} and not by states of their tokens; set "
                "context.kind=class or none."
            )
        return tensors[TOKENS].float().cpu()

    def about(self) -> dict[str, Any]:
        return {"kind": "prompt", "model": self._model.model_dump(mode="json")}

    def release(self) -> None:
        self._family = None


def open_contexts(about: dict[str, Any], device: torch.device | str = "cpu") -> Contexts:
    """What `Contexts.about` describes. Raises CheckpointError and ConfigError."""
    match about["kind"]:
        case "none":
            return Nothing()
        case "class":
            return Classes(about["names"])
        case "prompt":
            return Prompts(Model(**about["model"]), device)
    raise ConfigError(f"a context of kind {about['kind']!r} is unknown; allowed: class, none, prompt.")


class Encoder:
    """A space and contexts as `data.fill.fill` wants them. Places have no spread: a flow is applied to means."""

    def __init__(self, space: Space, contexts: Contexts, multiple: int) -> None:
        """multiple: sides in pixels must be multiples of this."""
        self._space, self._contexts, self.multiple = space, contexts, multiple

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, H, W]` in [0, 1] -> (z, zeros), each `[B, C, h, w]`."""
        z = self._space.encode(pixels)
        return z, torch.zeros_like(z)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return told(self._contexts.encode(prompts))
