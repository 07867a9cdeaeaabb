"""Stable Diffusion XL: the U-Net with two text encoders that is also told each picture's size and crop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowalign.data.batch import GEOMETRY, Conditioning
from flowalign.families.outline import clip_states
from flowalign.families.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Podell et al. 2023, 2307.01952. The base model; the refiner takes part in no training here."""

    name = "sdxl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    negative = "first"
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """`prompt_embeds` `[B, L, D]` and `pooled` `[B, P]`; zeros for the empty prompt where guidance uses zeros."""
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, device, 1, False)
        if pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
            embeds = embeds.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def embed_outline(self, texts: dict[str, Any], count: int) -> dict[str, Tensor]:
        (first, _), (second, pooled) = (clip_states(texts[name], count) for name in ("text_encoder", "text_encoder_2"))
        return {"prompt_embeds": torch.cat([first, second], dim=-1), "pooled": pooled}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output `[B, C, h, w]`. Sizes and crops stay float32: bfloat16 has no 1023."""
        known = conditioning.tensors
        x_t, embeds, pooled = self.cast(denoiser, x_t, known["prompt_embeds"], known["pooled"])
        return denoiser(
            x_t,
            self.noise.timesteps(t).to(x_t.device),
            encoder_hidden_states=embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": known[GEOMETRY].float()},
            return_dict=False,
        )[0]


FAMILY = StableDiffusionXL
