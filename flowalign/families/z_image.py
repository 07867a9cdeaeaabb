"""Z-Image: a single-stream transformer of six billion parameters, a rectified flow conditioned on a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowalign.data.batch import Conditioning
from flowalign.families.latent import FlowFamily, padded
from flowalign.families.outline import META, tokens

LENGTH = 256
"""Tokens kept of a prompt. The pipeline takes 512; few prompts of preference data come near, and all are stored this long."""


class ZImage(FlowFamily):
    """Z-Image Team, 2025, 2511.22699; Apache-2.0. Its transformer counts time from noise to picture and says x0 − ε."""

    name = "z_image"
    pipeline_classes = ("ZImagePipeline",)
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    negative = "last"
    attentions = ("attention",)
    context = "cap_feats"
    text_parts = ("text_encoder", "tokenizer")

    @classmethod
    def call(cls, guidance: float, count: int) -> dict[str, Any]:
        """The pipeline adds `guidance` times the difference to the prompt's own prediction: there 0 is none, and not 1."""
        return {"guidance_scale": guidance if guidance > 1 else 0.0}

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """`prompt_embeds` `[B, LENGTH, D]` and how many of them are real, `length` `[B]`."""
        rows, _ = pipeline.encode_prompt(prompts, device, False, max_sequence_length=LENGTH)
        states, real = padded(rows, LENGTH)
        return {"prompt_embeds": states, "length": real.sum(1)}

    def embed_outline(self, texts: dict[str, Any], count: int) -> dict[str, Tensor]:
        out = texts["text_encoder"](input_ids=tokens(count, LENGTH), output_hidden_states=True)
        return {"prompt_embeds": out.hidden_states[-2], "length": torch.full((count,), LENGTH, device=META)}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity `[B, C, h, w]`, in the transformer's dtype.

        The transformer takes each prompt at its own length, so the lengths are read back from the device at each call.
        """
        known = conditioning.tensors
        x_t, embeds = self.cast(denoiser, x_t, known["prompt_embeds"])
        lengths = [LENGTH] * len(embeds) if x_t.is_meta else known["length"].tolist()
        texts = [row[:length] for row, length in zip(embeds, lengths, strict=True)]
        pictures = list(x_t[:, :, None].unbind())
        towards = denoiser(pictures, 1 - t.to(x_t.device, torch.float32), texts, return_dict=False)[0]
        return -torch.stack(towards)[:, :, 0]


FAMILY = ZImage
