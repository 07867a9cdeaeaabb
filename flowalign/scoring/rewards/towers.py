"""Which library a tower comes from, by how it is named."""

from __future__ import annotations

from pathlib import Path

from flowalign.errors import ConfigError
from flowalign.scoring.rewards import open_clip_tower, transformers_tower
from flowalign.scoring.rewards.base import Shelf
from flowalign.scoring.rewards.contrastive import Contrastive


def take(shelf: Shelf, model: str, pretrained: str = "") -> Contrastive:
    """The tower that these two name, from the shelf or loaded onto it.

    `ViT-L-14` and the like, a folder with `open_clip_config.json`, or a JSON file are open_clip's, with `pretrained` a tag or
    a checkpoint; a folder with `config.json`, or `owner/name`, is a transformers CLIP or SigLIP and takes no `pretrained`.
    Raises ConfigError and CheckpointError.
    """
    folder = Path(model).expanduser()
    theirs = folder.is_dir() and (folder / "config.json").is_file() and not (folder / open_clip_tower.CONFIG).is_file()
    if not theirs and not (not folder.exists() and model.count("/") == 1 and not model.endswith(".json")):
        return open_clip_tower.take(shelf, model, pretrained)
    if pretrained:
        raise ConfigError(f"pretrained is {pretrained!r}, but {model} brings its own weights; leave pretrained out.")
    return transformers_tower.take(shelf, model)
