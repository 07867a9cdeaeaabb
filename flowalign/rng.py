"""Keyed randomness: every random number belongs to (seed, stream, example, draw), never to a global generator.

What an example draws therefore does not depend on batch size, accumulation, ranks, workers, or on where a run was
killed and resumed. Numbers are made on the CPU, so they are the same for every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = 0.6180339887498949  # (√5 − 1)/2: the Kronecker sequence of lowest discrepancy in one dimension


def key(*parts: int | str) -> int:
    """A 63-bit integer that depends on every part and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A CPU generator for one named stream of a run at one step."""
    return torch.Generator().manual_seed(key(seed, stream, step))


def starting_noise(seed: int, shape: Sequence[int]) -> tuple[Tensor, torch.Generator]:
    """What a picture of this seed is drawn from: standard normal numbers of `shape`, float32, and the generator after them."""
    after = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=after), after


@dataclass(frozen=True)
class Keyed:
    """The random numbers of one run. `ids` name examples, `draws` count how often each has been drawn before."""

    seed: int

    def normal(self, stream: str, ids: Sequence[int], draws: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal numbers `[B, *shape]`, float32, one independent block per (example, draw)."""
        out = torch.empty(len(ids), *shape)
        for row, example, draw in zip(out, ids, draws, strict=True):
            torch.randn(*shape, generator=torch.Generator().manual_seed(key(self.seed, stream, example, draw)), out=row)
        return out

    def uniform(self, stream: str, ids: Sequence[int], draws: Sequence[int]) -> Tensor:
        """Uniform numbers `[B]` in [0, 1), float64."""
        return torch.tensor(
            [key(self.seed, stream, example, draw) / 2**63 for example, draw in zip(ids, draws, strict=True)],
            dtype=torch.float64,
        )

    def stratified(self, stream: str, positions: Sequence[int]) -> Tensor:
        """Low-discrepancy numbers `[B]` in [0, 1), float64: a randomly shifted Kronecker sequence over the run's positions.

        Any stretch of consecutive positions, whether it is one batch or many, covers [0, 1) evenly.
        """
        shift = key(self.seed, stream, "shift") / 2**63
        place = torch.tensor(list(positions), dtype=torch.float64)
        return (shift + place * GOLDEN) % 1.0

    def permutation(self, stream: str, epoch: int, length: int) -> Tensor:
        """The order `[length]` in which an epoch visits the examples."""
        return torch.randperm(length, generator=generator(self.seed, stream, epoch))
