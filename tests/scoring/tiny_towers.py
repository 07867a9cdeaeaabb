"""Tiny checkpoints with random weights in the layouts that are published: open_clip folders, transformers folders, heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""An open_clip configuration with CLIP's own tokenizer."""


def spread(model: torch.nn.Module, seed: int) -> None:
    """Weights wide enough that pictures and prompts come out unlike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 1 and "logit" not in name:
                centre = 1.0 if "ln" in name.replace("norm", "ln") and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))


def open_clip_model(seed: int = 0, quick_gelu: bool = False) -> torch.nn.Module:
    from open_clip.model import CLIP

    model = CLIP(**CONFIG, quick_gelu=quick_gelu).eval()
    spread(model, seed)
    return model


def open_clip_folder(folder: Path, seed: int = 0, quick_gelu: bool = False, **preprocess: Any) -> Path:
    """As `open_clip`'s push to the hub writes it."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in open_clip_model(seed, quick_gelu).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": CONFIG | {"quick_gelu": quick_gelu}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def hps_checkpoint(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A configuration file, and a training checkpoint of open_clip's: what HPS v2 is published as."""
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    torch.save({"epoch": 1, "name": "tiny", "state_dict": open_clip_model(seed).state_dict()}, folder / "HPS_tiny.pt")
    return folder / "tiny.json", folder / "HPS_tiny.pt"


def transformers_clip(folder: Path, seed: int = 0, side: int = 32, activation: str = "quick_gelu") -> Path:
    """As `save_pretrained` writes a CLIP with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from tests.conftest import LETTERS, clip_tokenizer

    text = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=2 + 2 * len(LETTERS),
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act=activation,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=8,
        hidden_act=activation,
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    spread(model, seed)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def transformers_siglip(folder: Path, seed: int = 0, side: int = 32) -> Path:
    """As `save_pretrained` writes a SigLIP with its processor."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    from tests.conftest import LETTERS, clip_tokenizer

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text = shape | dict(
        vocab_size=2 + 2 * len(LETTERS),
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_size=32,
    )
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=shape | dict(image_size=side, patch_size=8)))
    spread(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def head(folder: Path, version: str, length: int = 24, seed: int = 0) -> Path:
    """A head with the keys of LAION's v1 or v2."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "v1": {"": (length, 1)},
        "v2": dict(zip((0, 2, 4, 6, 7), ((length, 16), (16, 8), (8, 8), (8, 4), (4, 1)), strict=True)),
    }
    state: dict[str, Tensor] = {}
    for name, (inputs, outputs) in sizes[version].items():
        prefix = f"layers.{name}." if version == "v2" else ""
        state[f"{prefix}weight"] = torch.randn(outputs, inputs, generator=generator)
        state[f"{prefix}bias"] = torch.randn(outputs, generator=generator)
    torch.save(state, folder / f"{version}.pth")
    return folder / f"{version}.pth"
