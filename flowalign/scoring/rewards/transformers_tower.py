"""Towers of transformers: CLIP and SigLIP, from a folder or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.errors import CheckpointError, reason
from flowalign.scoring.rewards.base import Shelf
from flowalign.scoring.rewards.contrastive import Contrastive, Origin, fingerprint, reading
from flowalign.scoring.rewards.framing import Framing

KINDS = ("clip", "siglip")
LICENCES = {"openai": "MIT", "laion": "MIT", "google": "Apache-2.0", "yuvalkirstain": "none stated; its base CLIP-H: MIT"}
"""By owner of a hub id; see docs/rewards.md."""


class TransformersTower(Contrastive):
    """`CLIPModel` or `SiglipModel`."""

    tokenizer: Any

    def image_vectors(self, x: Tensor) -> Tensor:
        return plain(self.model.get_image_features(pixel_values=x))

    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        text = self.model.config.text_config
        # Always padded to full length, as in training: to the longest of the batch, SigLIP's scores would depend on neighbours.
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=text.max_position_embeddings, return_tensors="pt"
        )
        names = ("input_ids",) if self.model.config.model_type == "siglip" else ("input_ids", "attention_mask")
        return plain(self.model.get_text_features(**{name: encoded[name].to(self.device) for name in names if name in encoded}))


def take(shelf: Shelf, model: str, processor: str = "") -> TransformersTower:
    """The tower, from the shelf or loaded onto it. `model` is a folder or a hub id; `processor` names another folder or hub id
    for tokenizer and preprocessing, where the model has none.

    Raises CheckpointError for what cannot be found or is neither CLIP nor SigLIP.
    """
    name, other = _local(model), _local(processor or model)
    key = f"transformers {name} {other} {shelf.dtype}"
    return shelf.take(key, lambda: _load(key, shelf, name, other))


def framing_of(processor: Any) -> Framing:
    """The preprocessing of a transformers image processor of CLIP or SigLIP. Raises CheckpointError for another rule."""
    size = {name: value for name, value in dict(processor.size).items() if value}
    cut = {name: value for name, value in dict(getattr(processor, "crop_size", None) or {}).items() if value}
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    resample = _filter(processor.resample)
    if "shortest_edge" in size and processor.do_center_crop and cut["height"] == cut["width"] == size["shortest_edge"]:
        return Framing(cut["height"], cut["width"], mean, std, "shortest", resample, "floor")
    if {"height", "width"} <= set(size) and not getattr(processor, "do_center_crop", False):
        return Framing(size["height"], size["width"], mean, std, "squash", resample)
    raise CheckpointError(
        f"its preprocessing ({type(processor).__name__}, size {size}, crop {cut}) is not that of CLIP or SigLIP; "
        "give a model that has theirs."
    )


def plain(output: Any) -> Tensor:
    """What `get_image_features` gives: a tensor in transformers 4, an object that holds it in transformers 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _load(key: str, shelf: Shelf, model: str, processor: str) -> TransformersTower:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    folder = Path(model)
    try:
        config = AutoConfig.from_pretrained(model)
        if config.model_type not in KINDS:
            raise CheckpointError(f"{model} is a {config.model_type} model; this reward takes {' or '.join(KINDS)}.")
        net = AutoModel.from_pretrained(model, dtype=torch.float32)
        framing = framing_of(AutoImageProcessor.from_pretrained(processor))
        tokenizer = AutoTokenizer.from_pretrained(processor)
    except CheckpointError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        raise CheckpointError(
            f"{model} is no model that transformers can load ({reason(error)}); give a folder that save_pretrained wrote with "
            "its processor, or a hub id that was downloaded once while online."
        ) from error
    mark = fingerprint(net, "transformers", framing, config.to_json_string(), reading(tokenizer), str(shelf.dtype))
    revision = getattr(config, "_commit_hash", None)
    said = f"transformers {folder.name if folder.is_dir() else model}{f' at {revision[:12]}' if revision else ''}"
    licence = "as its publisher states" if folder.is_dir() else LICENCES.get(model.split("/")[0], "as its publisher states")
    tower = TransformersTower(key, net, framing, Origin(said, licence, mark), shelf.device, shelf.dtype)
    tower.tokenizer = tokenizer
    return tower


def _local(name: str) -> str:
    """A folder's whole path; a hub id as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _filter(resample: Any) -> str:
    from PIL import Image

    return Image.Resampling(int(resample)).name.lower()
