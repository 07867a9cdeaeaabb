"""What a flow was trained on, and how far a picture is from that: those unlike it are moved less.

Mahalanobis distance of pooled features, its covariance shrunk as Ledoit and Wolf (2004) do. The limit is a quantile of the
distances of training inputs that the statistics have not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.errors import CheckpointError, DataError, reason
from flowalign.files import atomic
from flowalign.rng import Keyed

FILE = "domain.safetensors"
VERSION = 1
"""Of `features`: statistics of other features say nothing."""
LAYOUT = 2
"""Means are looked at in so many parts a side."""
FLOOR = 0.01
"""Added to variances before their log: flat is flat, however flat."""
LONGEST = 512
"""Vectors that are longer are averaged over neighbours."""
HELD = 4
"""One of so many training inputs is held out of the statistics, for the limit."""


def features(y: Tensor) -> Tensor:
    """Places `[B, D]` or `[B, C, h, w]` -> features `[B, F]`, float64 on the CPU.

    Of pictures, for every channel: the mean in each of 2 x 2 parts, the log of the standard deviation, and that of the mean
    step between neighbours. So other colours, flat areas and noise are all seen. Of vectors: themselves.
    """
    y = y.detach().float().cpu().double()
    if y.dim() == 2:
        return y if y.shape[1] <= LONGEST else torch.nn.functional.adaptive_avg_pool1d(y[:, None], LONGEST)[:, 0]
    layout = torch.nn.functional.adaptive_avg_pool2d(y, LAYOUT).flatten(1)
    steps = y.diff(dim=-1).square().mean((2, 3)) + y.diff(dim=-2).square().mean((2, 3))
    return torch.cat([layout, *((each + FLOOR).log() / 2 for each in (y.var((2, 3), correction=0), steps))], dim=1)


@dataclass(frozen=True)
class Domain:
    """Statistics of training inputs."""

    mean: Tensor
    """`[F]` float64"""
    whiten: Tensor
    """`[F, F]` float64: the difference from the mean times this has unit covariance."""
    limit: float
    """Distance up to which a picture counts as like them."""
    spread: float
    """Over which strength falls beyond it."""

    def distance(self, y: Tensor) -> Tensor:
        """Of places `[B, ...]`: `[B]` float64, about 1 for training inputs."""
        return self._distance(features(y))

    def _distance(self, found: Tensor) -> Tensor:
        # A row at a time, so that a distance does not depend on the batch in its last digits.
        rows = [(row - self.mean) @ self.whiten for row in found]
        return torch.stack(rows).square().mean(1).sqrt() if rows else torch.zeros(0, dtype=torch.float64)

    def factor(self, distance: Tensor) -> Tensor:
        """What strength is multiplied with `[B]`, in [0, 1]: 1 up to the limit, then exp(−½ ((d − limit) / spread)²)."""
        return torch.exp(-0.5 * ((distance - self.limit).clamp_min(0) / self.spread).square())

    def save(self, folder: Path) -> None:
        values = {"limit": self.limit, "spread": self.spread, "version": float(VERSION)}
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        with atomic(folder / FILE) as temporary:
            save_file({"mean": self.mean, "whiten": self.whiten, **numbers}, temporary)


def load_domain(folder: Path) -> Domain | None:
    """What `Domain.save` wrote; None where there is none. Raises CheckpointError."""
    if not (folder / FILE).is_file():
        return None
    try:
        found: Mapping[str, Tensor] = load_file(folder / FILE)
        if float(found["version"]) != VERSION:
            raise ValueError(f"it is of version {float(found['version']):g}, and {VERSION} is read")
        return Domain(found["mean"], found["whiten"], float(found["limit"]), float(found["spread"]))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder / FILE} cannot be read ({reason(error)}); fit the flow again.") from error


def fit_domain(found: Tensor, quantile: float, seed: int) -> Domain:
    """Statistics of training inputs' features `[n, F]`, float64. Raises DataError for fewer than 8 of them.

    The limit is the `quantile` of the distances of a quarter that is held out; strength falls over half of what lies between
    their median and the limit.
    """
    if len(found) < 2 * HELD:
        raise DataError(
            f"the flow has {len(found)} training pictures, too few to tell others from them; give at least {2 * HELD}, or set "
            "domain.quantile=null."
        )
    order = Keyed(seed).permutation("domain", 0, len(found))
    held, kept = found[order[: len(found) // HELD]], found[order[len(found) // HELD :]]
    # Standardised first: what varies little would else be lost in the shrinking towards what varies much.
    own = kept.std(0).clamp_min(1e-6)
    mean, covariance = shrunk(kept / own)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = (vectors / values.clamp_min(1e-12).sqrt() / own[:, None]).contiguous()
    domain = Domain(mean * own, whiten, 0.0, 1.0)
    distances = domain._distance(held)
    limit, middle = float(distances.quantile(quantile)), float(distances.median())
    return Domain(domain.mean, whiten, limit, max((limit - middle) / 2, 0.05 * limit, 1e-6))


def shrunk(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[F]` and shrunk covariance `[F, F]` of rows `[n, F]`.

    (1 − λ) S + λ μ I with μ = tr(S) / F and λ as Ledoit and Wolf (2004, J. Multivariate Analysis 88, section 3) estimate it.
    """
    count, size = rows.shape
    mean = rows.mean(0)
    centred = rows - mean
    sample = centred.T @ centred / count
    scale = sample.diagonal().mean()
    apart = (sample - scale * torch.eye(size, dtype=rows.dtype)).square().sum()
    squares = centred.square()
    noise = ((squares.T @ squares) / count - sample.square()).sum() / count
    weight = float((noise / apart).clamp(0, 1)) if float(apart) > 0 else 1.0
    return mean, (1 - weight) * sample + weight * scale * torch.eye(size, dtype=rows.dtype)
