"""Pretrain `tiny-sd3`, the Stable-Diffusion-3-shaped flow-matching checkpoint, from the embedded pictures.

    python samples/emoji/pretrain_sd3.py text          the two CLIP towers' projections and the second tower
    python samples/emoji/pretrain_sd3.py transformer   SD3Transformer2DModel on both styles of all train concepts; resumable
    python samples/emoji/pretrain_sd3.py export        fp16 diffusers folder, loss curves and sample sheet

The autoencoder, the tokenizer and the first text tower are those of `tiny-sd`. There is no T5: the pipeline puts 256 zeros in
its place, and the transformer is trained for that. Stages meet in --work (default runs/pretrain-sd3).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pretrain
import torch
import torch.nn.functional as F
from pretrain import HERE

BASE = HERE / "tiny-sd"
NOTO_WEIGHT = 1.0
T5_TOKENS = 256  # what StableDiffusion3Pipeline gives for a missing T5: so many zeros
SECOND = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, projection_dim=384)
TRANSFORMER = dict(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=6,
    num_attention_heads=6,
    attention_head_dim=32,
    caption_projection_dim=192,
    joint_attention_dim=256 + 128,
    pooled_projection_dim=2 * 384,
    pos_embed_max_size=16,
    qk_norm="rms_norm",
)
CURVES = {
    "text_2": ("cosine", "second text tower: cosine to teacher"),
    "transformer": ("v_error", "transformer: error of the velocity, train"),
}


class OneForAll:
    """Joint attention in which the last text token stands for `T5_TOKENS` equal ones.

    The zeros in T5's place have no position, so they are equal in every layer, and n equal keys weigh as much as one whose
    score is higher by log n. Exactly the function of the plain processor on 256 zeros, at a quarter of its cost. In
    float32: a CPU's bfloat16 attention is slow backwards.
    """

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask: None = None
    ) -> Any:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        picture = [heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        text = [heads(layer(encoder_hidden_states)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        norms = ((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k))
        for place, (norm, added) in enumerate(norms):
            picture[place], text[place] = norm(picture[place]), added(text[place])
        q, k, v = (torch.cat(pair, dim=2).float() for pair in zip(picture, text, strict=True))
        weight = torch.zeros(1, 1, 1, k.shape[2])
        weight[..., -1] = math.log(T5_TOKENS)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=weight)
        out = out.transpose(1, 2).flatten(2)
        split = hidden_states.shape[1]
        told = out[:, split:] if attn.context_pre_only else attn.to_add_out(out[:, split:])
        return attn.to_out[0](out[:, :split]), told


def towers(work: Path | None) -> tuple[Any, Any, Any]:
    """Tokenizer and both towers; from tiny-sd and untrained where `work` is None."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    if work is not None:
        names = ("text_encoder", "text_encoder_2")
        return tokenizer, *(CLIPTextModelWithProjection.from_pretrained(work / name) for name in names)
    tower = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32)
    first = CLIPTextModelWithProjection(pretrain.text_config(tokenizer, **pretrain.TEXT))
    first.text_model.load_state_dict(tower.text_model.state_dict() if hasattr(tower, "text_model") else tower.state_dict())
    return tokenizer, first, CLIPTextModelWithProjection(pretrain.text_config(tokenizer, **SECOND))


def train_text(work: Path, steps: int) -> None:
    """Both projections learn the sentence encoder's embedding; of the first tower, which knows it, nothing else learns."""
    tokenizer, first, second = towers(None)
    taught = pretrain.lessons()
    for name, tower, parameters in (
        ("text_encoder", first, list(first.text_projection.parameters())),
        ("text_encoder_2", second, list(second.parameters())),
    ):
        table = work / f"{'text' if tower is first else 'text_2'}.jsonl"
        tower.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        length = steps if tower is second else min(steps, 300)
        pretrain.distil(table, taught, tokenizer, lambda ids, t=tower: t(ids).text_embeds, parameters, steps=length, lr=2e-3)
        tower.save_pretrained(work / name)


@torch.no_grad()
def told(work: Path, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """States [N, MAX_TOKENS + 1, D], the last one a zero for T5, and pooled [N, P], as the pipeline has them, bfloat16."""
    tokenizer, first, second = towers(work)
    states, pooled = [], []
    for start in range(0, len(prompts), 256):
        tokens = pretrain.tokenize(tokenizer, prompts[start : start + 256])
        found = [tower(tokens, output_hidden_states=True) for tower in (first, second)]
        rows = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
        states.append(F.pad(rows, (0, 0, 0, 1)).bfloat16())
        pooled.append(torch.cat([each.text_embeds for each in found], dim=-1).bfloat16())
    return torch.cat(states), torch.cat(pooled)


def make_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**TRANSFORMER)


def train_transformer(work: Path, steps: int, batch: int = 64, lr: float = 8e-4) -> None:
    world = pretrain.encode_world(BASE / "vae")
    states, pooled = told(work, world.prompts)
    transformer = make_transformer()
    transformer.set_attn_processor(OneForAll())
    compiled = torch.compile(transformer)

    def errors() -> tuple[torch.Tensor, torch.Tensor]:
        x0, prompt = world.draw(batch, NOTO_WEIGHT)
        # Half of the times even, half towards the middle (logit-normal, Esser et al. 2024, 2403.03206).
        even = pretrain.stratified(batch)[torch.randperm(batch)]
        middle = torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)).sigmoid()
        t = torch.where(torch.rand(batch) < 0.5, even, middle)
        noise = torch.randn_like(x0)
        level = t[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = compiled(
                hidden_states=(1 - level) * x0 + level * noise,
                timestep=t * 1000,
                encoder_hidden_states=states[prompt],
                pooled_projections=pooled[prompt],
                return_dict=False,
            )[0]
        found = (velocity.float() - (noise - x0)).square().mean((1, 2, 3))
        return found.mean(), found

    pretrain.train_denoiser(work, "transformer", transformer, errors, steps=steps, lr=lr, ema_decay=0.999)


def export(work: Path, out: Path, picture: Path) -> None:
    """EMA weights as a diffusers folder in fp16, and a sheet of train concepts drawn with and without a style's name."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    state = torch.load(work / "transformer-state.pt", weights_only=True)
    transformer = make_transformer()
    transformer.load_state_dict(state["ema"])
    tokenizer, first, second = towers(work)
    vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    pipe = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.to(torch.float16).save_pretrained(out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 2**20:.1f} MiB, step {state['step']}")
    pretrain.sheet(out, picture, absent=("text_encoder_3", "tokenizer_3"))
    pretrain.curves(work, picture.parent, CURVES)


if __name__ == "__main__":
    stages = {"text": (train_text, 1500), "transformer": (train_transformer, 12000)}
    pretrain.run(__doc__, "tiny-sd3", "pretrain-sd3", stages, export)
