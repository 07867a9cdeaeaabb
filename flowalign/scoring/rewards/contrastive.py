"""`Contrastive`: an image tower and a text tower with one space, which CLIPScore, PickScore, HPS and aesthetic heads share."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flowalign.scoring.rewards.base import Backbone
from flowalign.scoring.rewards.framing import Framing, normalised

KEPT_PROMPTS = 8192
"""Text vectors kept per tower: 32 MB at 1024 dimensions."""
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Origin:
    """Where a tower's weights come from."""

    weights: str
    """Name and revision, for people."""
    licence: str
    fingerprint: str
    """Of weights, architecture, preprocessing, tokenizer and precision."""


class Contrastive(Backbone):
    """A frozen CLIP-shaped model. Features are unit vectors `[B, D]`, float32; text vectors are kept per prompt."""

    def __init__(
        self, key: str, model: nn.Module, framing: Framing, origin: Origin, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.key = key
        self.device = device
        self.dtype = dtype
        self.framing = framing
        self._statistics = framing.statistics(device)  # kept there, so that no batch waits for them
        self.origin = origin
        scale, bias = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
        self.scale = 1.0 if scale is None else float(scale.detach().exp())
        """What cosines are multiplied by, exp of the trained logit scale."""
        self.bias = 0.0 if bias is None else float(bias.detach())
        """What is added to them; 0 but for SigLIP."""
        self.model: Any = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @abstractmethod
    def image_vectors(self, x: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, height, width]` in the tower's precision -> `[B, D]`, of any length."""

    @abstractmethod
    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> `[B, D]`, of any length; a row depends on its own prompt only."""

    def prepare(self, image: Image.Image) -> Tensor:
        return self.framing.picture(image)

    def forget(self) -> None:
        self._texts.clear()

    def prepare_pixels(self, pixels: Tensor) -> Sequence[Tensor]:
        return self.framing.pixels(pixels)  # type: ignore[return-value]  # a tensor is a sequence of its rows

    def see(self, inputs: Sequence[Tensor]) -> Tensor:
        x = normalised(inputs, *self._statistics)
        return F.normalize(self.image_vectors(x.to(self.dtype)).float(), dim=-1)

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors `[B, D]`, float32 on `device`. Each prompt is encoded once, as long as it is remembered."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        # Not as inference tensors, which a later backward pass through the pictures could not use.
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), TEXTS_AT_ONCE):
                chunk = new[start : start + TEXTS_AT_ONCE]
                for prompt, vector in zip(chunk, F.normalize(self.text_vectors(chunk).float(), dim=-1), strict=True):
                    self._texts[prompt] = vector.clone()
            found = torch.stack([self._texts[prompt] for prompt in prompts])
        for prompt in dict.fromkeys(prompts):
            self._texts.move_to_end(prompt)
        while len(self._texts) > KEPT_PROMPTS:
            self._texts.popitem(last=False)
        return found

    def cosine(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines `[B]` between pictures that were seen and their prompts."""
        return (features * self.read(prompts)).sum(-1)


def reading(tokenizer: Any) -> dict[str, Any]:
    """How a tokenizer of transformers or open_clip turns text into numbers, for `fingerprint`.

    Where it lies and how it was called last are none of it.
    """
    if hasattr(tokenizer, "get_vocab"):
        if hasattr(tokenizer, "backend_tokenizer"):
            rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        else:
            rules = {"kind": type(tokenizer).__name__, "words": sorted(tokenizer.get_vocab().items())}
        sides = [getattr(tokenizer, f"{what}_side", None) for what in ("padding", "truncation")]
        return {"rules": rules, "pad": tokenizer.pad_token_id, "sides": sides}
    own = {name: getattr(tokenizer, name, None) for name in ("context_length", "strip_sep_token", "tokenizer_mode")}
    own |= {name: getattr(getattr(tokenizer, name, None), "__name__", None) for name in ("clean_fn", "reduction_fn")}
    words, merges = (list(getattr(tokenizer, name, ())) for name in ("encoder", "bpe_ranks"))  # in order
    inner = getattr(tokenizer, "tokenizer", None)
    return {**own, "words": words, "merges": merges, "inner": None if inner is None else reading(inner)}


def fingerprint(model: nn.Module, *settings: object) -> str:
    """16 hex digits of a model's weights and of whatever else changes what it computes."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(json.dumps([asdict(each) if isinstance(each, Framing) else each for each in settings], default=str).encode())
    return digest.hexdigest()
