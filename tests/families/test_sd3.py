"""What sets SD 3.5 apart: normed queries and keys, and blocks with a second attention."""

from __future__ import annotations

from pathlib import Path

import torch

from flowalign.families.sd3 import StableDiffusion3
from flowalign.train.trainable import make_trainable, trained
from tests.families.conftest import BUILDERS


def adapted(checkpoint: Path, *targets: str) -> set[str]:
    """Layers of the denoiser that get a LoRA."""
    family = StableDiffusion3.load(checkpoint, dtype=torch.float32)
    make_trainable(
        family.denoiser,
        "lora",
        rank=2,
        alpha=None,
        targets=targets or family.lora_targets,
        seed=0,
        gradient_checkpointing=False,
        idle=family.idle,
    )
    return {name.partition(".lora_")[0] for name in trained(family.denoiser)}


def test_lora_goes_to_the_joint_attentions_and_to_the_second_ones_when_asked(tmp_path: Path) -> None:
    BUILDERS["sd3-medium"]().save_pretrained(tmp_path / "medium")
    image, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    first = {f"transformer_blocks.0.attn.{name}" for name in (*image, *text)}
    last = {f"transformer_blocks.1.attn.{name}" for name in (*image, "add_k_proj", "add_v_proj")}
    assert adapted(tmp_path / "medium") == first | last
    second = {f"transformer_blocks.0.attn2.{name}" for name in image}
    assert adapted(tmp_path / "medium", "*.attn2.to_*") == second
    assert adapted(tmp_path / "medium", "attn2.to_q") == {"transformer_blocks.0.attn2.to_q"}
