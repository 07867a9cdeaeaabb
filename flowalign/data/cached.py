"""`Cached`: comparisons whose pictures and prompts lie in the cache, as arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flowalign.data.readers import BadRow
from flowalign.errors import DataError

ROWS = ("indices", "pictures", "ids", "preference", "weight", "scores", "grades", "objective_weights")
"""Arrays of a Cached that say something of each comparison by itself."""


@dataclass(frozen=True)
class Among:
    """Where the comparisons of a Cached stand among all that there are to train on, of which only some were prepared."""

    total: int
    """How many there are, as far as their fields say; those with a broken picture among them."""
    place: np.ndarray
    """int64 `[n]`: the place of each among them."""
    broken: np.ndarray
    """int64: places of those that were tried and have a picture that cannot be used."""
    ids: str
    """A hash of the ids of all of them."""


@dataclass(frozen=True)
class Cached:
    """n comparisons whose N pictures and prompt are all in a cache. About 40·N + 70 bytes a comparison."""

    indices: np.ndarray
    """int64 `[n]`: places in the Comparisons."""
    pictures: np.ndarray
    """uint8 `[n, N, 32]`: sha256 of each picture's bytes, best first, and of what is attached to it."""
    prompts: tuple[str, ...]
    """Distinct prompts."""
    prompt: np.ndarray
    """int64 `[n]`: place of the comparison's prompt in `prompts`."""
    ids: np.ndarray
    """int64 `[n]`."""
    preference: np.ndarray
    """float32 `[n]`."""
    weight: np.ndarray
    """float32 `[n]`."""
    scores: np.ndarray
    """float32 `[n, N]`: the weighted sum of each picture's scores; NaN where a row lacks one of them."""
    grades: np.ndarray
    """float32 `[n, N]`; NaN where a row has none."""
    annotators: tuple[str, ...]
    """Who judged, each once; "" stands for rows that do not say."""
    annotator: np.ndarray
    """int64 `[n]`: place of the comparison's annotator in `annotators`."""
    objective_weights: np.ndarray
    """float32 `[n, K]`: weights of the run's objectives, of sum 1; NaN where a row has none. K = 0 where none are read.
    Or `[n, N·K]`, each picture's own scores by the objectives, picture by picture, see `Steer.condition`."""
    told: np.ndarray
    """int64 `[n]`: place in `prompts` of what the policy is told, where the weights are put in words; else as `prompt`."""
    num_chosen: int
    flips: tuple[bool, ...]
    """Which variants of each picture are cached: upright (False), mirrored (True)."""
    bad: tuple[BadRow, ...]
    """Rows that were asked for and cannot be used."""
    inside: bool
    """Whether every picture lies in the row that names it, so that it cannot change without the source's own files."""
    attached: tuple[str, ...] = ()
    """What entries hold beside latents: noise, or masks, which some may lack."""
    among: Among | None = None
    """None: these are all."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def about(self) -> dict[str, Any]:
        """Which comparisons there are to train on, however many of them were prepared: what a saved state must agree with."""
        if self.among is not None:
            return {"comparisons": self.among.total, "ids": self.among.ids}
        return {"comparisons": len(self), "ids": digest(self.ids)}

    def only(self, keep: np.ndarray) -> Cached:
        """Those with True in `keep` `[n]`; `bad` stays, `among` is the caller's."""
        rows = {name: getattr(self, name)[keep] for name in ROWS}
        texts = numbered(self.prompts, self.prompt[keep], self.told[keep], self.annotators, self.annotator[keep])
        return replace(self, **rows, **texts)


def digest(ids: np.ndarray) -> str:
    """A short hash of ids in their order."""
    return hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()


def joined(one: Cached, other: Cached) -> Cached:
    """Both as if they had been filled together, for parts of one source without a comparison in common, and no attachments.

    Raises DataError where they are of different kinds.
    """
    kinds = [(each.pictures.shape[1], each.num_chosen) for each in (one, other)]
    if kinds[0] != kinds[1]:
        said = " and ".join(f"{pictures} pictures of which {chosen} chosen" for pictures, chosen in kinds)
        raise DataError(f"some comparisons have {said}; train on one kind at a time")
    order = np.argsort(np.concatenate([one.indices, other.indices]))
    prompts, prompt, told = _united(one.prompts, other.prompts, (one.prompt, other.prompt), (one.told, other.told))
    names, annotator = _united(one.annotators, other.annotators, (one.annotator, other.annotator))
    return replace(
        one,
        **{name: np.concatenate([getattr(one, name), getattr(other, name)])[order] for name in ROWS},
        **numbered(prompts, prompt[order], told[order], names, annotator[order]),
        bad=tuple(sorted((*one.bad, *other.bad), key=lambda row: row.row)),
        inside=one.inside and other.inside,
    )


def _united(one: Sequence[str], other: Sequence[str], *places: tuple[np.ndarray, np.ndarray]) -> tuple[Any, ...]:
    """The texts of both, each once, and for each pair of arrays of places in the one and in the other, all of them in these."""
    known = {text: place for place, text in enumerate(one)}
    moved = np.array([known.setdefault(text, len(known)) for text in other], dtype=np.int64)
    return list(known), *(np.concatenate([first, moved[second]]) for first, second in places)


def numbered(
    prompts: Sequence[str], prompt: np.ndarray, told: np.ndarray, annotators: Sequence[str], annotator: np.ndarray
) -> dict[str, Any]:
    """The texts of a Cached and the places of its rows in them, for rows that name some of these texts by their places."""
    texts, places = _by_first_use(prompts, np.concatenate([prompt, told]))
    names, who = _by_first_use(annotators, annotator)
    count = len(prompt)
    return {"prompts": texts, "prompt": places[:count], "told": places[count:], "annotators": names, "annotator": who}


def _by_first_use(texts: Sequence[str], places: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The texts that rows name, in the order of the rows, whatever others there are, and each row's place in them."""
    used, first_seen, place = np.unique(places, return_index=True, return_inverse=True)
    order = np.argsort(first_seen)
    return tuple(texts[each] for each in used[order]), np.argsort(order)[place]
