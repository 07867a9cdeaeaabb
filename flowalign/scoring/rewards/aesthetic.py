"""Aesthetic score: a linear head, or several with nothing between, on the unit picture vector of a CLIP.

Sources: LAION-AI/aesthetic-predictor (v1, one layer, for ViT-L/14, B/32 and B/16) and
christophschuhmann/improved-aesthetic-predictor (v2, five layers, for ViT-L/14), both 2022; used by Schuhmann et al., 2022,
arXiv:2210.08402. Both are for OpenAI's weights. Raters' scale is 1 to 10; heads may leave it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flowalign.errors import CheckpointError, allowed
from flowalign.scoring.rewards import published, towers
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.contrastive import Contrastive

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Weight `[out, in]` and bias `[out]` of each layer, first to last."""
V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_{}_linear.pth"
V2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"


@dataclass(frozen=True)
class Published:
    """A head that others offer."""

    address: str
    sha256: str | None
    licence: str


HEADS = {
    ("v2", "ViT-L-14"): Published(V2, "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0", "Apache-2.0"),
    ("v1", "ViT-L-14"): Published(V1.format("l_14"), "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba", "MIT"),
    ("v1", "ViT-B-32"): Published(V1.format("b_32"), None, "MIT"),
    ("v1", "ViT-B-16"): Published(V1.format("b_16"), None, "MIT"),
}
SAME = {
    "openai/clip-vit-large-patch14": "ViT-L-14",
    "openai/clip-vit-base-patch32": "ViT-B-32",
    "openai/clip-vit-base-patch16": "ViT-B-16",
}
"""Other names of the towers that heads are for."""


@dataclass(frozen=True)
class Aesthetic(Reward):
    """Layers on the unit vector of the picture; the prompt is not looked at."""

    card: Card
    backbone: Contrastive
    layers: Layers = field(repr=False)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return apply(self.layers, features)


def apply(layers: Layers, vectors: Tensor) -> Tensor:
    """Unit vectors `[B, D]` -> scores `[B]`: one affine map after the other."""
    for weight, bias in layers:
        vectors = torch.addmm(bias, vectors, weight.T)
    return vectors[:, 0]


def load(shelf: Shelf, *, weights: str = "v2", model: str = "ViT-L-14", pretrained: str = "") -> Aesthetic:
    """weights: "v1", "v2", or a file with a head of that layout. model, pretrained: see `towers.take`.

    Raises CheckpointError for a head that is missing, is no head, or is for vectors of another length.
    """
    path, licence = _find(weights, model, pretrained)
    state, about = published.read(path)
    layers = read_head(state, path)
    tower = towers.take(shelf, model, pretrained)
    length = tower.read(["a picture"]).shape[1]
    if length != layers[0][0].shape[1]:
        raise CheckpointError(
            f"{path.name} is a head for vectors of {layers[0][0].shape[1]} numbers and {model} gives {length}; "
            "name the tower that it was trained on as model."
        )
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for layer in layers for part in layer)).hexdigest()[:16]
    return Aesthetic(
        Card(
            name="aesthetic",
            title=about.get("title", "LAION aesthetic: how much people like to look at it"),
            range=(-math.inf, math.inf),
            better="higher",
            licence=f"head: {about.get('licence', licence)}; tower: {tower.origin.licence}",
            source=about.get("source", "Schuhmann et al., 2022, arXiv:2210.08402"),
            weights=f"{path.name} on {tower.origin.weights}",
            reads_prompt=False,
            differentiable=True,
            fingerprint=f"aesthetic-1-{digest}-{tower.origin.fingerprint}",
        ),
        tower,
        tuple((weight.to(shelf.device), bias.to(shelf.device)) for weight, bias in layers),
    )


def read_head(state: dict[str, Tensor], path: Path) -> Layers:
    """The layers of a state dict with the keys `weight`, `bias` (v1) or `layers.N.weight`, `layers.N.bias` (v2), float32.

    Raises CheckpointError for other keys, and for layers that do not fit on one another or do not end in one number.
    """
    numbers = sorted({int(found[1]) for name in state if (found := re.fullmatch(r"layers\.(\d+)\.weight", name))})
    names = [f"layers.{number}." for number in numbers] or [""]
    wanted = {name + part for name in names for part in ("weight", "bias")}
    if set(state) == wanted:
        layers = tuple((state[f"{name}weight"].float(), state[f"{name}bias"].float()) for name in names)
        rows, columns = ([weight.shape[axis] for weight, _ in layers if weight.ndim == 2] for axis in (0, 1))
        if (
            len(rows) == len(layers)
            and rows == [*columns[1:], 1]
            and [bias.shape for _, bias in layers] == [(n,) for n in rows]
        ):
            return layers
    raise CheckpointError(
        f"{path} is no head of linear layers that end in one number; it holds {', '.join(sorted(state)[:6]) or 'nothing'}."
    )


def _find(weights: str, model: str, pretrained: str) -> tuple[Path, str]:
    path = Path(weights).expanduser()
    if path.is_file():
        return path, "as its publisher states"
    versions = sorted({version for version, _ in HEADS})
    if weights not in versions:
        raise CheckpointError(f"{weights!r} is no file and no version of the head; {allowed(weights, versions)}, or a file.")
    tower = SAME.get(model, model.removesuffix("-quickgelu"))
    head = HEADS.get((weights, tower))
    if head is None or pretrained not in ("", "openai"):
        towers_of = ", ".join(sorted(name for version, name in HEADS if version == weights))
        raise CheckpointError(
            f"the head {weights} is for OpenAI's {towers_of} and not for {model} {pretrained}".rstrip()
            + "; choose one of these models, or give weights: FILE of a head for yours."
        )
    return published.from_address(head.address, head.sha256), head.licence


REWARD = load
