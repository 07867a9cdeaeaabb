"""Qwen-Image: a multimodal transformer over packed latents, a rectified flow conditioned on a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from flowalign.data.batch import Conditioning
from flowalign.families.base import Posterior
from flowalign.families.latent import FlowFamily, padded
from flowalign.families.outline import META, tokens

LENGTH = 256
"""Tokens kept of a prompt. The pipeline takes 1024; few prompts of preference data come near, and all are stored this long."""
TEMPLATE = 34
"""Tokens that the pipeline's template puts before a prompt, dropped once they are encoded."""


class QwenImage(FlowFamily):
    """Wu et al. 2025, 2508.02324; Apache-2.0."""

    name = "qwen_image"
    pipeline_classes = ("QwenImagePipeline",)
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    idle = (  # the text that leaves the last block, and its queries
        "transformer_blocks.-1.attn.add_q_proj",
        "transformer_blocks.-1.attn.norm_added_q",
        "transformer_blocks.-1.attn.to_add_out",
        "transformer_blocks.-1.txt_mlp",
    )
    text_parts = ("text_encoder", "tokenizer")
    vae_class = "AutoencoderKLQwenImage"

    @staticmethod
    def factor(vae: dict[str, Any]) -> int:
        return int(2 ** len(vae["temperal_downsample"]))

    @classmethod
    def channels(cls, config: Any) -> int:
        return int(config.in_channels) // cls.patch**2

    @classmethod
    def call(cls, guidance: float, count: int) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": [""] * count} if guidance > 1 else {"true_cfg_scale": 1.0}

    @classmethod
    def pack(cls, noise: Tensor) -> Tensor:
        """`[B, C, h, w]` -> `[B, h/2·w/2, 4C]`."""
        return QwenImagePipeline._pack_latents(noise, *noise.shape)

    @classmethod
    def unpack(cls, latents: Tensor, shape: tuple[int, int]) -> Tensor:
        return QwenImagePipeline._unpack_latents(latents, *shape, 1)[:, :, 0]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Posterior:
        """As a video of one frame; every channel is whitened by the VAE's own mean and spread."""
        vae = self._vae()
        latents = vae.encode((pixels * 2 - 1).to(vae.device, vae.dtype)[:, :, None]).latent_dist

        def per_channel(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=vae.device).view(1, -1, 1, 1)

        mean, std = per_channel(vae.config.latents_mean), per_channel(vae.config.latents_std)
        return Posterior((latents.mean[:, :, 0].float() - mean) / std, latents.std[:, :, 0].float() / std)

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """`prompt_embeds` `[B, LENGTH, D]` and which of them are real, `mask` `[B, LENGTH]` bool."""
        rows = [pipeline.encode_prompt(prompt, device, max_sequence_length=LENGTH)[0][0] for prompt in prompts]
        states, real = padded(rows, LENGTH)
        return {"prompt_embeds": states, "mask": real}

    def embed_outline(self, texts: dict[str, Any], count: int) -> dict[str, Tensor]:
        out = texts["text_encoder"](input_ids=tokens(count, TEMPLATE + LENGTH), output_hidden_states=True)
        real = torch.ones(count, LENGTH, dtype=torch.bool, device=META)
        return {"prompt_embeds": out.hidden_states[-1][:, TEMPLATE:], "mask": real}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity `[B, C, h, w]`, in the transformer's dtype."""
        known = conditioning.tensors
        x_t, embeds = self.cast(denoiser, x_t, known["prompt_embeds"])
        batch, _, height, width = x_t.shape
        velocity = denoiser(
            hidden_states=self.pack(x_t),
            timestep=t.to(x_t.device, x_t.dtype),  # the transformer multiplies by T itself
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=known["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return self.unpack(velocity, (height, width))


FAMILY = QwenImage
