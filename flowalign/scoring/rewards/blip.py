"""`Blip`: an image encoder and a text encoder that looks at the picture through cross-attention, of transformers' classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flowalign.scoring.rewards.base import Backbone
from flowalign.scoring.rewards.contrastive import Origin
from flowalign.scoring.rewards.framing import Framing, normalised

TOKENS = 35
"""Length that prompts are padded or cut to, as BLIP was trained."""


class Blip(Backbone):
    """A frozen BLIP. Features are the picture's tokens `[B, 1 + P, D]`, the first of them for the whole, in its precision."""

    def __init__(
        self,
        key: str,
        vision: nn.Module,
        text: nn.Module,
        tokenizer: Any,
        framing: Framing,
        origin: Origin,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.key, self.device, self.dtype, self.framing, self.origin = key, device, dtype, framing, origin
        self._statistics = framing.statistics(device)
        self._tokenizer = tokenizer
        self._vision: Any = vision.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self._text: Any = text.eval().requires_grad_(False).to(device=device, dtype=dtype)

    def prepare(self, image: Image.Image) -> Tensor:
        return self.framing.picture(image)

    def prepare_pixels(self, pixels: Tensor) -> Sequence[Tensor]:
        return self.framing.pixels(pixels)  # type: ignore[return-value]  # a tensor is a sequence of its rows

    def see(self, inputs: Sequence[Tensor]) -> Tensor:
        return self._vision(pixel_values=normalised(inputs, *self._statistics).to(self.dtype)).last_hidden_state

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Prompts alone -> the state of their first token `[B, D]`, float32."""
        return self._first(prompts, None)

    def read_with(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Prompts that look at their pictures -> the state of their first token `[B, D]`, float32."""
        return self._first(prompts, features)

    def _first(self, prompts: Sequence[str], features: Tensor | None) -> Tensor:
        encoded = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        states = self._text(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], encoder_hidden_states=features
        ).last_hidden_state
        return states[:, 0].float()
