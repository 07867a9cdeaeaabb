"""FLUX.1: a transformer over packed latents that predicts the velocity of a rectified flow, with distilled guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from flowalign.data.batch import Conditioning
from flowalign.families.latent import FlowFamily
from flowalign.families.outline import clip_states, tokens

GUIDANCE = 3.5
"""The guidance that a guidance-distilled transformer is told in training: the one it is commonly asked for pictures with."""
T5_LENGTH = 512
"""Tokens that the pipeline has T5 read."""


class Flux(FlowFamily):
    """Black Forest Labs 2024. Latents are packed 2x2 for the transformer; outside it they are `[B, C, h, w]` as everywhere."""

    name = "flux"
    pipeline_classes = ("FluxPipeline",)
    lora_targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    @classmethod
    def channels(cls, config: Any) -> int:
        return int(config.in_channels) // cls.patch**2

    @classmethod
    def pack(cls, noise: Tensor) -> Tensor:
        """`[B, C, h, w]` -> `[B, h/2·w/2, 4C]`."""
        return FluxPipeline._pack_latents(noise, *noise.shape)

    @classmethod
    def unpack(cls, latents: Tensor, shape: tuple[int, int]) -> Tensor:
        return FluxPipeline._unpack_latents(latents, *shape, 1)

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """T5's `prompt_embeds` `[B, L, D]` and CLIP's `pooled` `[B, P]`."""
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device, 1)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def embed_outline(self, texts: dict[str, Any], count: int) -> dict[str, Tensor]:
        embeds = texts["text_encoder_2"](tokens(count, T5_LENGTH))[0]
        return {"prompt_embeds": embeds, "pooled": clip_states(texts["text_encoder"], count)[1]}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity `[B, C, h, w]`, in the transformer's dtype."""
        known = conditioning.tensors
        x_t, embeds, pooled = self.cast(denoiser, x_t, known["prompt_embeds"], known["pooled"])
        batch, _, height, width = x_t.shape
        places = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, x_t.dtype)
        guided = getattr(denoiser, "config", self.denoiser.config).guidance_embeds
        velocity = denoiser(
            hidden_states=self.pack(x_t),
            timestep=t.to(x_t.device, torch.float32),  # the transformer multiplies by T itself
            guidance=torch.full((batch,), GUIDANCE, device=x_t.device) if guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=places,
            return_dict=False,
        )[0]
        return self.unpack(velocity, (height, width))


FAMILY = Flux
