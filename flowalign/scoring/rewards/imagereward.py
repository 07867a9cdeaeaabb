"""ImageReward: how well a picture pleases people for its prompt; a BLIP that reads the prompt while it looks, and five layers.

Source: Xu et al., 2023, arXiv:2304.05977. The score is (x - 0.167)/1.033, about standard normal over their data. The published
checkpoint is mapped onto transformers' BLIP; sizes are read off its tensors, and heads are 64 wide, as in all its parts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowalign.errors import CheckpointError, reason
from flowalign.scoring.rewards import published
from flowalign.scoring.rewards.aesthetic import Layers, apply, read_head
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.blip import Blip
from flowalign.scoring.rewards.contrastive import Origin, fingerprint, reading
from flowalign.scoring.rewards.framing import Framing

HUB = "THUDM/ImageReward"
FILE = "ImageReward.pt"
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_WIDTH = 64
CHANNEL_MEAN, CHANNEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ADDED_TOKENS = ("[DEC]", "[ENC]")
"""What BLIP adds to BERT's vocabulary."""
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
"""From BLIP's image encoder to transformers'; the text encoder's names are the same."""


@dataclass(frozen=True)
class ImageReward(Reward):
    """Layers on the state of the prompt's first token, which has seen the picture; standardised."""

    card: Card
    backbone: Blip
    layers: Layers = field(repr=False)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return (apply(self.layers, self.backbone.read_with(features, prompts)) - MEAN) / STD


def load(shelf: Shelf, *, weights: str = HUB, tokenizer: str = "bert-base-uncased") -> ImageReward:
    """weights: a checkpoint file with the published keys, or a hub id that has an ImageReward.pt. tokenizer: a folder or hub id
    of BERT's.

    Raises CheckpointError for what is missing, has other keys, or does not fit together.
    """
    local = Path(weights).expanduser()
    if not local.is_file() and (weights.count("/") != 1 or local.suffix):
        raise CheckpointError(f"{weights} is no file and no hub id; give ImageReward.pt, or {HUB}.")
    path = local if local.is_file() else published.from_hub(weights, FILE)
    state, _ = published.read(path)
    parts = {prefix: _part(state, prefix, path) for prefix in (VISION, TEXT, HEAD)}
    layers = read_head(parts[HEAD], path)
    key = f"imagereward {path.resolve()} {tokenizer} {shelf.dtype}"
    backbone = shelf.take(key, lambda: _blip(key, shelf, parts, path, tokenizer))
    return ImageReward(
        Card(
            name="imagereward",
            title="ImageReward: how well the picture pleases people for its prompt",
            range=(-math.inf, math.inf),
            better="higher",
            licence="Apache-2.0",
            source="Xu et al., 2023, arXiv:2304.05977",
            weights=backbone.origin.weights,
            reads_prompt=True,
            differentiable=True,
            fingerprint=f"imagereward-1-{backbone.origin.fingerprint}",
        ),
        backbone,
        tuple((weight.to(shelf.device), bias.to(shelf.device)) for weight, bias in layers),
    )


def _part(state: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """What lies under the prefix, without it; positions, which are 0, 1, 2 ..., left out."""
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    part.pop("embeddings.position_ids", None)
    if not part:
        raise CheckpointError(f"{path} has no {prefix}*; give a checkpoint of ImageReward, such as {FILE} of {HUB}.")
    return part


def _blip(key: str, shelf: Shelf, parts: Mapping[str, dict[str, Tensor]], path: Path, tokenizer: str) -> Blip:
    vision, text, framing = _towers(parts[VISION], parts[TEXT], path)
    words = _tokenizer(tokenizer, parts[TEXT]["embeddings.word_embeddings.weight"].shape[0])
    whole = nn.ModuleDict({"vision": vision, "text": text})
    head = hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(parts[HEAD].items()))).hexdigest()
    mark = fingerprint(whole, "imagereward", framing, head, reading(words), str(shelf.dtype))
    origin = Origin(path.name, "Apache-2.0", mark)
    return Blip(key, vision, text, words, framing, origin, shelf.device, shelf.dtype)


def _towers(pictures: dict[str, Tensor], prompts: dict[str, Tensor], path: Path) -> tuple[nn.Module, nn.Module, Framing]:
    """transformers' models with these weights, and how pictures are framed for them."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        patch, positions = pictures["patch_embed.proj.weight"], pictures["pos_embed"]
        width, side = patch.shape[0], math.isqrt(positions.shape[1] - 1) * patch.shape[2]
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=pictures["blocks.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(pictures, "blocks"),
                num_attention_heads=max(1, width // HEAD_WIDTH),
                image_size=side,
                patch_size=patch.shape[2],
                hidden_act="gelu",
                layer_norm_eps=1e-6,  # transformers' own default is another
            )
        )
        words = prompts["embeddings.word_embeddings.weight"]
        text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words.shape[0],
                hidden_size=words.shape[1],
                encoder_hidden_size=width,
                intermediate_size=prompts["encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_layers(prompts, "encoder.layer"),
                num_attention_heads=max(1, words.shape[1] // HEAD_WIDTH),  # 12; transformers' own default is 8
                max_position_embeddings=prompts["embeddings.position_embeddings.weight"].shape[0],
                hidden_act="gelu",
                layer_norm_eps=1e-12,
                is_decoder=True,  # which is how transformers asks for cross-attention; tokens still see what follows them
            ),
            add_pooling_layer=False,
        )
        renamed = {_renamed(name): value for name, value in pictures.items()}
        vision.load_state_dict({name: value.float() for name, value in renamed.items()})
        text.load_state_dict({name: value.float() for name, value in prompts.items()})
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        said = f"it has no {error.args[0]}" if isinstance(error, KeyError) else _mismatch(error)
        raise CheckpointError(f"{path} is no checkpoint of ImageReward: {said}; give one such as {FILE} of {HUB}.") from error
    return vision, text, Framing(side, side, CHANNEL_MEAN, CHANNEL_STD)


def _mismatch(error: Exception) -> str:
    """What torch says in several lines, its first detail."""
    lines = str(error).strip().splitlines()
    detail = lines[min(1, len(lines) - 1)].strip()
    return f"{detail[:1].lower()}{detail[1:]}"[:200].rstrip(". ")


def _layers(state: Mapping[str, Tensor], name: str) -> int:
    """How many numbered layers there are."""
    return 1 + max(int(found[1]) for key in state if (found := re.match(rf"{re.escape(name)}\.(\d+)\.", key)))


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _tokenizer(name: str, rows: int) -> Any:
    """BERT's, with BLIP's tokens. Raises CheckpointError for one that knows more tokens than the model has."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    try:
        found = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # transformers and the hub raise many kinds
        raise CheckpointError(
            f"the tokenizer {name} cannot be loaded ({reason(error)}); download bert-base-uncased once while online, or give "
            "tokenizer: FOLDER."
        ) from error
    found.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    if len(found) > rows:
        raise CheckpointError(
            f"the tokenizer {name} knows {len(found)} tokens and the model {rows}; give the one that it was trained with."
        )
    return found


REWARD = load
