"""LPIPS: how far a picture is from a reference picture in the features of AlexNet, weighted by what people see.

Source: Zhang et al., 2018, arXiv:1801.03924, version 0.1 on AlexNet. The authors' package `lpips` carries their weights, the
features are torchvision's AlexNet. Features of each place are made unit vectors, their squared differences weighted per
channel, averaged over places and added up over five layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowalign.errors import CheckpointError, MissingExtraError, RunError
from flowalign.scoring.rewards import published
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels
from flowalign.scoring.rewards.reference import Reference, read_reference

TRUNK = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
DIGEST = "7be5be79"
"""The beginning of its sha256."""
CONVOLUTIONS = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
"""AlexNet's, by their number in torchvision: stride and padding."""
POOLED = (3, 6)
"""Before these, the largest of 3x3 is taken at every other place."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pixels in [-1, 1], as the authors normalise."""
SIDE = 31
"""Below it, pooling leaves nothing."""


@dataclass(frozen=True)
class Distance:
    """To one reference picture."""

    reference: Reference
    filters: tuple[tuple[Tensor, Tensor], ...] = field(repr=False)
    """Weight and bias of each convolution."""
    weights: tuple[Tensor, ...] = field(repr=False)
    """Per layer `[1, C, 1, 1]`, not below 0."""

    def __call__(self, pictures: Tensor) -> Tensor:
        """`[N, 3, H, W]` in [0, 1] -> `[N]`. Raises RunError for pictures that AlexNet cannot see."""
        if min(pictures.shape[2:]) < SIDE:
            size = f"{pictures.shape[3]}x{pictures.shape[2]}"
            raise RunError(f"LPIPS needs pictures of at least {SIDE}x{SIDE} pixels and this one has {size}.")
        ours, theirs = self.features(pictures), self.features(self.reference.like(pictures))
        layers = zip(self.weights, ours, theirs, strict=True)
        distances = [(weight * (_unit(a) - _unit(b)).square()).sum(1).mean((1, 2)) for weight, a, b in layers]
        return torch.stack(distances).sum(0)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """After each of the five convolutions, `[N, C, h, w]`."""
        shift, scale = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (SHIFT, SCALE))
        x, found = (2 * pictures - 1 - shift) / scale, []
        for (number, (stride, padding)), (weight, bias) in zip(CONVOLUTIONS.items(), self.filters, strict=True):
            x = F.max_pool2d(x, 3, 2) if number in POOLED else x
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    """Divided by its length over channels; what is 0 stays 0."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def load(shelf: Shelf, *, reference: str, trunk: str = "", weights: str = "") -> Reward:
    """reference: a picture's file. trunk: a file of torchvision's AlexNet, downloaded if left out. weights: the authors'
    alex.pth, that of the package lpips if left out.

    Raises DataError, CheckpointError and MissingExtraError for what cannot be had.
    """
    backbone = Pixels.of(shelf)
    other = read_reference(reference, backbone)
    linear = Path(weights).expanduser() if weights else _packaged()
    alexnet = Path(trunk).expanduser() if trunk else _downloaded()
    parts, layers = published.read(alexnet)[0], published.read(linear)[0]
    filters = tuple(
        (_get(parts, f"features.{n}.weight", alexnet), _get(parts, f"features.{n}.bias", alexnet)) for n in CONVOLUTIONS
    )
    heads = tuple(_get(layers, f"lin{n}.model.1.weight", linear) for n in range(len(CONVOLUTIONS)))
    if [head.shape for head in heads] != [(1, weight.shape[0], 1, 1) for weight, _ in filters]:
        raise CheckpointError(f"{linear} does not fit {alexnet}; give the authors' alex.pth and torchvision's AlexNet.")
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for pair in (*filters, heads) for x in pair)).hexdigest()[:16]
    return Formula(
        Card(
            name="lpips",
            title="LPIPS: perceptual distance to a reference picture",
            range=(0.0, math.inf),
            better="lower",
            licence="layers' weights: BSD-2-Clause; AlexNet: BSD-3-Clause",
            source="Zhang et al., 2018, arXiv:1801.03924",
            weights=f"{linear.name} on {alexnet.name}; reference {other.name}",
            reads_prompt=False,
            differentiable=True,
            fingerprint=f"lpips-1-{digest}-{other.fingerprint}",
        ),
        backbone,
        Distance(
            other,
            tuple((weight.to(shelf.device), bias.to(shelf.device)) for weight, bias in filters),
            tuple(head.to(shelf.device) for head in heads),
        ),
    )


def _get(state: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in state:
        raise CheckpointError(
            f"{path} has no {name}; give the authors' alex.pth as weights and torchvision's AlexNet as trunk."
        )
    return state[name].float().contiguous()


def _downloaded() -> Path:
    path = published.from_address(TRUNK, None)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(DIGEST):
        raise CheckpointError(f"{path} is not torchvision's AlexNet; remove it and download it again, or give trunk: FILE.")
    return path


def _packaged() -> Path:
    """The authors' weights in their package, which is not imported."""
    try:
        return Path(str(metadata.distribution("lpips").locate_file("lpips/weights/v0.1/alex.pth")))
    except metadata.PackageNotFoundError:
        raise MissingExtraError("lpips", "quality", "the reward lpips") from None


REWARD = load
