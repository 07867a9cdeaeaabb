"""GMSD: how unevenly the edges of a picture differ from those of a reference picture; a perceptual distance without weights.

Source: Xue, Zhang, Mou and Bovik, 2014, "Gradient magnitude similarity deviation", IEEE TIP 23(2), arXiv:1308.3052. It agrees
with people about as well as learned distances do for blur, noise and compression, and compares places: a picture that has
moved by some pixels is another one. Learned features forgive that; see the reward lpips, which needs weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowalign.errors import RunError
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels, grey
from flowalign.scoring.rewards.reference import Reference, read_reference

STABILISER = 170.0
"""T of the paper, for brightness of 0 to 255."""


@dataclass(frozen=True)
class Distance:
    """To one reference picture."""

    reference: Reference

    def __call__(self, pictures: Tensor) -> Tensor:
        """`[N, 3, H, W]` in [0, 1] -> `[N]`: the deviation of (2 g g' + T)/(g² + g'² + T) over half the size.

        Raises RunError for pictures of one or two pixels in both directions: one value has no deviation.
        """
        if max(pictures.shape[2:]) <= 2:
            raise RunError("GMSD needs a picture of more than 2 pixels in height or width; give a larger one.")
        edges, theirs = gradient_magnitude(pictures), gradient_magnitude(self.reference.like(pictures))
        similarity = (2 * edges * theirs + STABILISER) / (edges.square() + theirs.square() + STABILISER)
        spread = similarity.flatten(1) - similarity.mean((1, 2))[:, None]
        return torch.linalg.vector_norm(spread, dim=1) / (spread.shape[1] - 1) ** 0.5


def gradient_magnitude(pictures: Tensor) -> Tensor:
    """`[N, 3, H, W]` in [0, 1] -> `[N, ⌈H/2⌉, ⌈W/2⌉]`: Prewitt's filters on means of 2x2 pixels; black beyond the edges."""
    y = 255 * grey(pictures)[:, None]
    y = F.avg_pool2d(F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2)), 2)
    prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3, device=y.device, dtype=y.dtype) / 3
    slopes = F.conv2d(y, torch.stack([prewitt, prewitt.T])[:, None], padding=1)
    return torch.linalg.vector_norm(slopes, dim=1)  # whose gradient at 0 is 0


def load(shelf: Shelf, *, reference: str) -> Reward:
    """reference: a picture's file. Raises DataError for one that cannot be read."""
    backbone = Pixels.of(shelf)
    other = read_reference(reference, backbone)
    return Formula(
        Card(
            name="gmsd",
            title="GMSD: perceptual distance to a reference picture, without weights",
            range=(0.0, 0.71),  # the deviation of values in [0, 1], of which there are two or more
            better="lower",
            licence="formula",
            source="Xue et al., 2014, arXiv:1308.3052",
            weights=f"none; reference {other.name}",
            reads_prompt=False,
            differentiable=True,
            fingerprint=f"gmsd-1-{other.fingerprint}",
        ),
        backbone,
        Distance(other),
    )


REWARD = load
