"""Groups of pictures and votes between them: pure functions, whose randomness is keyed by what it is for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import torch

from flowalign.rng import generator, key

Vote = tuple[tuple[int, ...], tuple[int, ...]]
"""Tones of the pictures of the chosen and of the rejected group."""


def simpson(labels: Sequence[Hashable]) -> float:
    """1 − Σp² over the shares p of the labels: the probability that two of them, drawn with replacement, differ.

    In [0, 1 − 1/n]: 0 where all n are alike. Source: Simpson 1949, "Measurement of diversity", as Gini-Simpson index.
    """
    return 1 - sum((count / len(labels)) ** 2 for count in Counter(labels).values())


def entropy(labels: Sequence[Hashable]) -> float:
    """−Σ p log p in nats, in [0, log n]."""
    shares = [count / len(labels) for count in Counter(labels).values()]
    return abs(sum(p * math.log(p) for p in shares))  # abs: no −0.0 where all are alike


def by_index(first: Sequence[int], second: Sequence[int]) -> Vote | None:
    """The group of the higher Simpson index as the chosen one; None for a tie."""
    gap = simpson(first) - simpson(second)
    if abs(gap) < 1e-9:
        return None
    return (tuple(first), tuple(second)) if gap > 0 else (tuple(second), tuple(first))


def diversity_votes(law: Sequence[float], k: int, count: int, seed: int, name: str) -> list[Vote]:
    """`count` votes between two groups of k pictures of one prompt, whose tones are drawn by `law`; ties are drawn again.

    Two groups of one picture are always a tie: k is at least 2.
    """
    rng, votes = generator(seed, f"groups of {k}: {name}"), []
    while len(votes) < count:
        drawn = torch.multinomial(torch.tensor(law), 2 * k, replacement=True, generator=rng).tolist()
        vote = by_index(drawn[:k], drawn[k:])
        if vote is not None:
            votes.append(vote)
    return votes


def matched_pairs(votes: Sequence[Vote]) -> list[Vote]:
    """The same votes as pairs: the i-th picture of the chosen group against the i-th of the rejected one."""
    return [((better,), (worse,)) for vote in votes for better, worse in zip(*vote, strict=True)]


def rings(count: int, k: int) -> Iterator[tuple[int, ...]]:
    """Every k neighbours of `count` pairs in a circle: all pairs are in equally many groups. One group where k = count."""
    for start in range(count if k < count else 1):
        yield tuple((start + step) % count for step in range(k))


def flipped(rate: float, seed: int, *name: int | str) -> bool:
    """Whether the vote `name` is turned round: with probability `rate`, and at a higher rate wherever at a lower one."""
    return key(seed, "flip", *name) / 2**63 < rate
