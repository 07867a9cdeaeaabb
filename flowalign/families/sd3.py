"""Stable Diffusion 3 and 3.5: a multimodal transformer that predicts the velocity of a rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowalign.data.batch import Conditioning
from flowalign.families.latent import FlowFamily
from flowalign.families.outline import META, clip_states, tokens

T5_LENGTH = 256
"""Tokens that the pipeline has T5 read."""


class StableDiffusion3(FlowFamily):
    """Esser et al. 2024, 2403.03206. Two CLIP encoders and T5, which a checkpoint may leave out."""

    name = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    lora_targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    idle = ("transformer_blocks.-1.attn.add_q_proj", "transformer_blocks.-1.attn.norm_added_q")  # no text goes out of it
    negative = "first"
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    timesteps = "logit_normal"

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """`prompt_embeds` `[B, L, D]`, CLIP states before T5's, and `pooled` `[B, P]`."""
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device, 1, False)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def embed_outline(self, texts: dict[str, Any], count: int) -> dict[str, Tensor]:
        clips, pooled = zip(*(clip_states(texts[name], count) for name in ("text_encoder", "text_encoder_2")), strict=True)
        width, t5 = self.denoiser.config.joint_attention_dim, texts["text_encoder_3"]
        last = torch.empty(count, T5_LENGTH, width, device=META, dtype=self.dtype)
        last = last if t5 is None else t5(tokens(count, T5_LENGTH))[0]
        first = torch.cat(clips, dim=-1)
        padded = torch.nn.functional.pad(first, (0, width - first.shape[-1]))
        return {"prompt_embeds": torch.cat([padded, last], dim=1), "pooled": torch.cat(pooled, dim=-1)}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity `[B, C, h, w]`, in the transformer's dtype."""
        known = conditioning.tensors
        x_t, embeds, pooled = self.cast(denoiser, x_t, known["prompt_embeds"], known["pooled"])
        return denoiser(
            hidden_states=x_t,
            timestep=self.noise.timesteps(t).to(x_t.device),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


FAMILY = StableDiffusion3
