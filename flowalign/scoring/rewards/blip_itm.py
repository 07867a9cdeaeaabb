"""BLIP's image-text matching: whether prompt and picture belong together.

Source: Li et al., 2022, arXiv:2201.12086. `value` chooses what of the model counts: "probability" of a match by the head that
sees both, "log_odds" of the same, which does not saturate at 1, or the "cosine" of the two projections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowalign.errors import CheckpointError, reason
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.blip import Blip
from flowalign.scoring.rewards.contrastive import Origin, fingerprint, reading
from flowalign.scoring.rewards.transformers_tower import framing_of

Value = Literal["probability", "log_odds", "cosine"]
RANGES: dict[Value, tuple[float, float]] = {
    "probability": (0.0, 1.0),
    "log_odds": (-math.inf, math.inf),
    "cosine": (-1.0, 1.0),
}


class Matching(Blip):
    """A `Blip` with the heads of a retrieval model."""

    heads: nn.ModuleDict


@dataclass(frozen=True)
class BlipItm(Reward):
    """One of three values of the same model, which share the pass through the picture."""

    card: Card
    backbone: Matching = field(repr=False)
    value: Value

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        heads = self.backbone.heads
        if self.value == "cosine":
            picture = F.normalize(heads["picture"](features[:, 0].float()), dim=-1)
            return (picture * F.normalize(heads["text"](self.backbone.read(prompts)), dim=-1)).sum(-1)
        no, yes = heads["match"](self.backbone.read_with(features, prompts)).unbind(1)
        return torch.sigmoid(yes - no) if self.value == "probability" else yes - no


def load(shelf: Shelf, *, model: str = "Salesforce/blip-itm-large-coco", value: Value = "probability") -> BlipItm:
    """model: a folder or hub id of transformers' BlipForImageTextRetrieval. value: see the module.

    Raises CheckpointError for what is missing or another kind of model.
    """
    folder = Path(model).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else model
    key = f"blip-itm {name} {shelf.dtype}"
    backbone = shelf.take(key, lambda: _load(key, shelf, name))
    return BlipItm(
        Card(
            name="blip_itm",
            title="BLIP matching: whether picture and prompt belong together",
            range=RANGES[value],
            better="higher",
            licence=backbone.origin.licence,
            source="Li et al., 2022, arXiv:2201.12086",
            weights=backbone.origin.weights,
            reads_prompt=True,
            differentiable=True,
            fingerprint=f"blip-itm-1-{value}-{backbone.origin.fingerprint}",
        ),
        backbone,
        value,
    )


def _load(key: str, shelf: Shelf, name: str) -> Matching:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "blip":
            raise CheckpointError(f"{name} is a {config.model_type} model; this reward takes a BLIP for retrieval.")
        net, about = BlipForImageTextRetrieval.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        framing = framing_of(AutoImageProcessor.from_pretrained(name))
        tokenizer = AutoTokenizer.from_pretrained(name)
    except CheckpointError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        raise CheckpointError(
            f"{name} is no model that transformers can load ({reason(error)}); give a folder that save_pretrained wrote with "
            "its processor, or a hub id that was downloaded once while online."
        ) from error
    if about["missing_keys"]:  # transformers would go on with random weights
        raise CheckpointError(
            f"{name} lacks {sorted(about['missing_keys'])[0]} and is no BLIP for retrieval; give one such as "
            "Salesforce/blip-itm-large-coco."
        )
    mark = fingerprint(net, "blip-itm", framing, config.to_json_string(), reading(tokenizer), str(shelf.dtype))
    revision = getattr(config, "_commit_hash", None)
    local = Path(name).is_dir()
    said = f"transformers {Path(name).name if local else name}{f' at {revision[:12]}' if revision else ''}"
    origin = Origin(said, "BSD-3-Clause" if name.startswith("Salesforce/") else "as its publisher states", mark)
    found = Matching(key, net.vision_model, net.text_encoder, tokenizer, framing, origin, shelf.device, shelf.dtype)
    heads = nn.ModuleDict({"picture": net.vision_proj, "text": net.text_proj, "match": net.itm_head})
    found.heads = heads.eval().requires_grad_(False).to(device=shelf.device, dtype=torch.float32)
    return found


REWARD = load
