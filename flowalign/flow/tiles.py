"""Pictures of any size as squares of one size, and squares that overlap as one picture again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class Tiling:
    """Where the squares of a picture lie."""

    size: tuple[int, int]
    """Height and width of the picture."""
    scaled: tuple[int, int]
    """Height and width of what is cut."""
    side: int
    corners: tuple[tuple[int, int], ...]
    """Top and left of each square in what is cut."""


def tiling(height: int, width: int, side: int, fit: str) -> Tiling:
    """Squares of `side` over a picture, overlapping by a quarter or more.

    fit "scale": the picture is brought to a shorter side of `side` first, so that a square picture is one square. "tile": it is
    cut as it is; only one that is too small is enlarged.
    """
    shorter = min(height, width)
    factor = side / shorter if fit == "scale" or shorter < side else 1.0
    scaled = (max(side, round(height * factor)), max(side, round(width * factor)))
    corners = tuple((top, left) for top in _starts(scaled[0], side) for left in _starts(scaled[1], side))
    return Tiling((height, width), scaled, side, corners)


def _starts(length: int, side: int) -> list[int]:
    """Evenly spread, the first at 0 and the last at the end."""
    count = 1 + -(-(length - side) // max(1, side * 3 // 4))
    return [round(place * (length - side) / max(1, count - 1)) for place in range(count)]


def cut(picture: Tensor, tiles: Tiling) -> Tensor:
    """Picture `[3, H, W]` -> squares `[T, 3, side, side]`."""
    if tiles.scaled != tiles.size:
        picture = _resized(picture, tiles.scaled)
    return torch.stack([picture[:, top : top + tiles.side, left : left + tiles.side] for top, left in tiles.corners])


def joined(squares: Tensor, tiles: Tiling) -> Tensor:
    """Squares `[T, 3, side, side]` -> picture `[3, H, W]`; where they overlap, their mean by how far their edges are."""
    ramp = torch.arange(1, tiles.side + 1, dtype=squares.dtype, device=squares.device)
    ramp = torch.minimum(ramp, ramp.flip(0)).clamp_max(max(1, tiles.side // 4))
    window = ramp[:, None] * ramp[None]
    total = torch.zeros(squares.shape[1], *tiles.scaled, dtype=squares.dtype, device=squares.device)
    weight = torch.zeros_like(total[:1])
    for square, (top, left) in zip(squares, tiles.corners, strict=True):
        place = (slice(None), slice(top, top + tiles.side), slice(left, left + tiles.side))
        total[place] += square * window
        weight[place] += window
    out = total / weight
    return out if tiles.scaled == tiles.size else _resized(out, tiles.size)


def _resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(picture[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
