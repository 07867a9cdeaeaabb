"""What a round draws and trains on: rows of (prompt, seed), keyed, so that a round is the same whenever it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flowalign.errors import ConfigError
from flowalign.rng import key


@dataclass(frozen=True)
class Row:
    """One picture to draw."""

    prompt: str
    seed: int
    weights: Mapping[str, float] | None = None
    """Objective weights that it is drawn under and judged by; None: those of the whole run."""

    def line(self) -> dict[str, Any]:
        """As a plan's file has it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def parted(prompts: Sequence[str], held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """(prompts to train on, `held_out` others), each once, in their given order. Raises ConfigError where too few are left."""
    once = list(dict.fromkeys(prompts))
    if held_out >= len(once):
        raise ConfigError(
            f"held_out is {held_out} of {len(once)} prompts, so that none are left to train on; hold fewer out, or name a file."
        )
    kept = set(sorted(once, key=lambda prompt: key(seed, "held-out", prompt))[:held_out])
    return [prompt for prompt in once if prompt not in kept], [prompt for prompt in once if prompt in kept]


def in_turn(prompts: Sequence[str], count: int | None, seed: int, number: int) -> list[str]:
    """The prompts of round `number`: `count` after those of the round before in one shuffled order that begins again."""
    count = len(prompts) if count is None else min(count, len(prompts))
    order = sorted(prompts, key=lambda prompt: key(seed, "turn", prompt))
    return [order[(number * count + place) % len(order)] for place in range(count)]


def unsteered(prompt: str) -> Sequence[None]:
    """The weights of a prompt's pictures where there are none."""
    return (None,)


def rows_of_round(
    prompts: Sequence[str],
    images: int,
    seed: int,
    number: int,
    under: Callable[[str], Sequence[Mapping[str, float] | None]] = unsteered,
) -> list[Row]:
    """`images` rows of each prompt under each of its weights, which `under` gives; a seed belongs to (seed, round, prompt,
    place) and to nothing else.
    """
    return [
        Row(prompt, key(seed, "draw", number, prompt, place) % 2**32, weights)
        for prompt in prompts
        for place, weights in enumerate(each for each in under(prompt) for _ in range(images))
    ]


def mixed(
    now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], share: float, seed: int, number: int
) -> list[Mapping[str, Any]]:
    """Rows of this round, and of those `before` as many that they are `share` of all, or all there are, drawn by lot."""
    count = min(len(before), round(len(now) * share / (1 - share)))
    lot = sorted(range(len(before)), key=lambda place: key(seed, "replay", number, place))[:count]
    return [*now, *(before[place] for place in sorted(lot))]
