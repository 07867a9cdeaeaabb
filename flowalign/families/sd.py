"""Stable Diffusion 1.x and 2.x: a U-Net that predicts ε, v or x0 from latents and CLIP text states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowalign.data.batch import Conditioning
from flowalign.errors import CheckpointError
from flowalign.families.latent import LatentFamily, Parts
from flowalign.families.loading import Located, load_parts
from flowalign.families.noise import DiscreteNoise
from flowalign.families.outline import clip_states


class StableDiffusion(LatentFamily):
    """Noise schedule and prediction type come from the checkpoint's scheduler settings, its number of steps included."""

    name = "sd"
    component = "unet"
    pipeline_classes = ("StableDiffusionPipeline",)
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    negative = "first"
    attentions = ("attn2",)
    text_parts = ("text_encoder", "tokenizer")

    def __init__(self, located: Located, dtype: torch.dtype, parts: Parts = load_parts) -> None:
        super().__init__(located, dtype, parts)
        config = self.denoiser.config
        if config.in_channels != config.out_channels or config.time_cond_proj_dim is not None:
            raise CheckpointError(
                f"{located.name} has a U-Net that takes more than latents, a time and text (inpainting, upscaling or "
                "guidance-distilled); use a plain text-to-image checkpoint."
            )
        self.multiple = self._factor * 2 ** (len(config.block_out_channels) - 1)

    def read_noise(self, scheduler: Any) -> DiscreteNoise:
        return DiscreteNoise(self.located.name, scheduler)

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """`prompt_embeds` `[B, L, D]`"""
        return {"prompt_embeds": pipeline.encode_prompt(prompts, device, 1, False)[0]}

    def embed_outline(self, texts: dict[str, Any], count: int) -> dict[str, Tensor]:
        return {"prompt_embeds": clip_states(texts["text_encoder"], count)[0]}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output `[B, C, h, w]`, in its own dtype; inputs are cast to its weights' dtype unless autocast is on."""
        x_t, embeds = self.cast(denoiser, x_t, conditioning.tensors["prompt_embeds"])
        times = self.noise.timesteps(t).to(x_t.device)
        return denoiser(x_t, times, encoder_hidden_states=embeds, return_dict=False)[0]


FAMILY = StableDiffusion
