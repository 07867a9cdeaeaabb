"""Towers of open_clip: by name and tag, by name and local checkpoint, or a folder or file with a configuration of its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowalign.errors import CheckpointError, ConfigError, reason
from flowalign.scoring.rewards.base import Shelf
from flowalign.scoring.rewards.contrastive import Contrastive, Origin, fingerprint, reading
from flowalign.scoring.rewards.framing import Framing

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
)
LICENCES = {"openai": "MIT", "laion": "MIT"}
"""By how a tag begins; see docs/rewards.md."""
FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)  # what loaders raise


@dataclass(frozen=True)
class Spec:
    """What open_clip needs to build a model and to read its weights."""

    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: str
    """A file, or a tag of open_clip's."""
    tokenizer: str
    """What open_clip's `get_tokenizer` takes; "" for a configuration file that lies alone."""
    licence: str
    file: bool
    """Whether `weights` is a file."""


class OpenClipTower(Contrastive):
    """An open_clip model."""

    tokenize: Callable[[Sequence[str]], Tensor]

    def image_vectors(self, x: Tensor) -> Tensor:
        return self.model.encode_image(x)

    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenize(list(prompts)).to(self.device))


def take(shelf: Shelf, model: str, pretrained: str, reframe: Mapping[str, Any] | None = None) -> OpenClipTower:
    """The tower, from the shelf or loaded onto it. `model` is a name of open_clip's, a folder that holds
    `open_clip_config.json`, or such a file; `pretrained` is a tag, a checkpoint, or "" for the folder's own weights or, with
    a name, OpenAI's. reframe: what of the preprocessing is other than open_clip's.

    Raises ConfigError for unknown names and tags, CheckpointError for weights that are missing or do not fit.
    """
    spec = _spec(model, pretrained)
    name = str(Path(model).expanduser().resolve()) if Path(model).expanduser().exists() else model
    looks = [f"{what}={each}" for what, each in (reframe or {}).items()]
    key = " ".join([f"open_clip {name} {spec.weights} {shelf.dtype}", *looks])
    return shelf.take(key, lambda: _load(key, shelf, spec, model, reframe or {}))


def from_model(
    key: str,
    net: nn.Module,
    tokenize: Callable[[Sequence[str]], Tensor],
    framing: Framing,
    origin: tuple[str, str],
    shelf: Shelf,
) -> OpenClipTower:
    """A tower around an open_clip model in float32. origin: what to say of its weights, and their licence."""
    mark = fingerprint(net, "open_clip", framing, str(net), reading(tokenize), str(shelf.dtype))
    tower = OpenClipTower(key, net, framing, Origin(*origin, mark), shelf.device, shelf.dtype)
    tower.tokenize = tokenize
    return tower


def framing_of(preprocess: dict[str, Any]) -> Framing:
    """open_clip's preprocessing as ours."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = (
        (value,) * 3 if isinstance(value, float) else tuple(value) for value in (preprocess["mean"], preprocess["std"])
    )
    # Anything but bicubic and random is bilinear to open_clip; "random" is bicubic when scoring.
    resample = "bilinear" if preprocess.get("interpolation", "bicubic") not in ("bicubic", "random") else "bicubic"
    fill = preprocess.get("fill_color", 0)
    return Framing(height, width, mean, std, preprocess.get("resize_mode") or "shortest", resample, "even", fill)


def _load(key: str, shelf: Shelf, spec: Spec, model: str, reframe: Mapping[str, Any]) -> OpenClipTower:
    import open_clip

    try:
        net = build(spec.config)
        path = spec.weights if spec.file else open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, spec.weights))
        open_clip.load_checkpoint(net, path)
        tokenize = open_clip.get_tokenizer(spec.tokenizer) if spec.tokenizer else _alone(spec.config["text_cfg"])
    except Exception as error:  # safetensors, torch's unpickler and the hub raise many kinds on files that are not theirs
        where = (
            "check that the file belongs to this model"
            if spec.file
            else "download it once while online, or give pretrained: FILE"
        )
        raise CheckpointError(f"the weights {spec.weights} of {model} cannot be loaded ({reason(error)}); {where}.") from error
    size = getattr(net.visual, "image_size", 224)
    framing = replace(framing_of({"size": size} | spec.preprocess), **reframe)
    said = f"open_clip {Path(model).name}, {Path(spec.weights).name}"
    return from_model(key, net, tokenize, framing, (said, spec.licence), shelf)


def build(config: dict[str, Any]) -> nn.Module:
    """A model of open_clip's from its configuration, with random weights; nothing is downloaded."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    config = deepcopy(config)
    text, vision = config["text_cfg"], config["vision_cfg"]
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    kind = (CoCa if "multimodal_cfg" in config else CustomTextCLIP) if custom else CLIP
    return kind(**config)


def _spec(model: str, pretrained: str) -> Spec:
    path = Path(model).expanduser()
    if path.is_dir() or path.suffix == ".json":
        return _own(path, pretrained)
    return _named(model, pretrained)


def _own(path: Path, pretrained: str) -> Spec:
    """A folder, or a file of a folder, with a configuration of its own."""
    file, folder = (path / CONFIG, path) if path.is_dir() else (path, path.parent)
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        config = about.get("model_cfg", about)
        config["vision_cfg"], config["text_cfg"]  # whoever builds a model asks for both
    except FAILURES as error:
        raise CheckpointError(
            f"{file} is not a configuration of open_clip's ({reason(error)}); give the {CONFIG} of the model."
        ) from error
    found = [(folder / name).resolve() for name in WEIGHTS if (folder / name).is_file()]
    weights = Path(pretrained).expanduser().resolve() if pretrained else next(iter(found), None)
    if weights is None or not weights.is_file():
        missing = pretrained or f"any of {', '.join(WEIGHTS)} in {folder}"
        raise CheckpointError(f"{missing} is not there; put the model's weights into the folder or give pretrained: FILE.")
    preprocess = {"mean": _openai("MEAN"), "std": _openai("STD")}
    tokenizer = f"local-dir:{folder}" if file.name == CONFIG else ""
    return Spec(config, preprocess | about.get("preprocess_cfg", {}), str(weights), tokenizer, _stated(folder), True)


def _named(model: str, pretrained: str) -> Spec:
    """A name of open_clip's own list."""
    import open_clip

    config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{model!r} is no model of open_clip's and no folder here; {hint}give one of open_clip.list_models(), a folder, "
            "or a hub id of a transformers CLIP such as owner/name."
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    tag = pretrained or ("openai" if "openai" in tags else "")
    defaults = {"mean": _openai("MEAN"), "std": _openai("STD")}
    if Path(tag).expanduser().is_file():
        return Spec(config, defaults, str(Path(tag).expanduser().resolve()), model, "as its publisher states", True)
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=1)
        raise ConfigError(
            f"{tag!r} is no checkpoint file and no tag of {model}; {f'did you mean {near[0]!r}? ' if near else ''}"
            f"allowed: {', '.join(tags) or 'a file, since open_clip lists no weights for this model'}."
        )
    about = open_clip.get_pretrained_cfg(model, tag)
    # The weights say which activation they were trained with; open_clip only warns where its configuration has the other.
    config["quick_gelu"] = bool(about.get("quick_gelu", False))
    stated = {name: about[name] for name in ("mean", "std", "interpolation", "resize_mode") if about.get(name)}
    licence = next((text for start, text in LICENCES.items() if tag.startswith(start)), f"as the publisher of {tag} states")
    return Spec(config, defaults | stated, tag, model, licence, False)


def _openai(which: str) -> tuple[float, ...]:
    from open_clip import constants

    return tuple(getattr(constants, f"OPENAI_DATASET_{which}"))


def _alone(text: dict[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer that a configuration names, or CLIP's own."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    context = text.get("context_length", 77)
    named = text.get("hf_tokenizer_name")
    if named:
        return HFTokenizer(named, context_length=context, **text.get("tokenizer_kwargs", {}))
    return SimpleTokenizer(context_length=context, **text.get("tokenizer_kwargs", {}))


def _stated(folder: Path) -> str:
    """The licence that a card beside the weights states."""
    try:
        return str(json.loads((folder / "card.json").read_text(encoding="utf-8"))["licence"])
    except FAILURES:
        return "as its publisher states"
