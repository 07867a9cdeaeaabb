"""Pairs that lie in memory as tensors: vectors, small pictures, or what another program made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.data.batch import Batch
from flowalign.errors import DataError
from flowalign.flow.matching import told
from flowalign.rng import Keyed


@dataclass(frozen=True)
class ArrayPairs:
    """n pairs for `fit`; position p holds pair `permutation("order", epoch)[p mod n]`. Raises DataError for unequal lengths."""

    rejected: Tensor
    """y⁻ `[n, ...]` float32"""
    chosen: Tensor
    """y⁺ `[n, ...]` float32"""
    context: Tensor | None = None
    """Classes `[n]` int64, vectors `[n, D]` or tokens `[n, L, D]`."""
    preference: Tensor | None = None
    """`[n]` probability that chosen is preferred; None is 1."""
    weight: Tensor | None = None
    """`[n]` factor on the loss; None is 1."""

    def __post_init__(self) -> None:
        if self.rejected.shape != self.chosen.shape or not len(self.chosen):
            raise DataError(
                f"rejected is {list(self.rejected.shape)} and chosen {list(self.chosen.shape)}; give two of one shape."
            )
        for name in ("context", "preference", "weight"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.chosen):
                raise DataError(f"{name} has {len(value)} rows for {len(self.chosen)} pairs; give one for each.")

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, places: Tensor, draws: tuple[int, ...], positions: tuple[int, ...]) -> Batch:
        """The pairs at `places` `[B]` int64."""
        mean = torch.stack([self.chosen[places], self.rejected[places]], dim=1).float()
        one = torch.ones(len(places))
        return Batch(
            mean,
            torch.zeros_like(mean),
            torch.zeros(len(places), 2, 6),
            told(None if self.context is None else self.context[places]),
            one if self.preference is None else self.preference[places].float(),
            one if self.weight is None else self.weight[places].float(),
            tuple(places.tolist()),
            draws,
            positions,
        )

    def batches(self, seed: int, batch_size: int, position: int = 0, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Without end, from a position over all ranks, `batch_size` pairs for this one at a time; drawn by the seed alone."""
        rng, epoch, order = Keyed(seed), -1, torch.empty(0)
        start = position + rank * batch_size
        while True:
            rows = []
            for place in range(start, start + batch_size):
                turn, rest = divmod(place, len(self))
                if turn != epoch:
                    epoch, order = turn, rng.permutation("order", turn, len(self))
                rows.append((int(order[rest]), turn))
            places, draws = zip(*rows, strict=True)
            yield self.batch(torch.tensor(places), draws, tuple(range(start, start + batch_size)))
            start += batch_size * world_size

    def sequential(self, batch_size: int, draw: int = 0) -> Iterator[Batch]:
        """Every pair once, in order, at one of its draws."""
        for places in torch.arange(len(self)).split(batch_size):
            yield self.batch(places, (draw,) * len(places), tuple(places.tolist()))
