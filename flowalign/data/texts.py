"""What the rows of a table or archive say beside their pictures: a few numbers a row, from whole columns where rows are plain.

A run needs all rows for its split, its order and its counts, long before it needs their pictures. Reading a million of them one
by one takes half a minute. So pairs in columns of their own, with a prompt and at most a few numbers, are taken together, and
every row with anything else about it is read as ever; the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from flowalign.data.plain import Plain, plain_pairs
from flowalign.data.readers import Comparisons, held_out_of
from flowalign.data.records import Comparison, key63
from flowalign.data.rows import TarRows
from flowalign.data.tables import ParquetRows
from flowalign.errors import DataError

ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Texts:
    """R rows, pictures unopened; about 20 bytes each, and 8 for each picture where several rows may name one."""

    prompts: np.ndarray
    """int64 `[R]`: what the split by prompt goes by; equal for equal prompts, -1 where the row cannot be read."""
    ids: np.ndarray
    """int64 `[R]`, see `Comparison.id`."""
    ties: np.ndarray
    """bool `[R]`."""
    matter: np.ndarray
    """int64 `[R]`: equal where prompt and objective weights are."""
    names: np.ndarray | None
    """int64 `[R, N]`: keys of the pictures' names, best first; None where no row names a picture that another does."""
    shape: tuple[int, int]
    """(N pictures, how many of them are chosen) of each row."""
    bad: dict[int, str]
    """Why a row cannot be read."""

    def split(self, fraction: float, at_most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `split_by_prompt`, with the seed that they were read with."""
        return held_out_of(self.prompts, fraction, at_most)

    def count(self, places: np.ndarray) -> dict[str, int]:
        """How many distinct pictures and prompts these rows name, as a forecast wants it."""
        pictures = self.shape[0] * len(places) if self.names is None else len(np.unique(self.names[places]))
        return {"pictures": pictures, "prompts": len(np.unique(self.prompts[places]))}

    def audit(self, places: np.ndarray) -> dict[str, Any]:
        """As `audit` of these rows, all of which can be read."""
        prompts, count = np.unique(self.prompts[places], return_counts=True)
        pictures, chosen = self.shape
        found = {
            "comparisons": len(places),
            "bad_rows": 0,
            "ties": int(self.ties[places].sum()),
            "prompts": len(prompts),
            "largest_prompt_share": int(count.max()) / len(places) if len(places) else 0.0,
            "pictures": pictures * len(places),
            "pictures_per_comparison": {pictures: len(places)} if len(places) else {},
            "pictures_in_both_roles": 0,
            "same_picture": 0,
            "duplicates": 0,
            "contradictions": 0,
        }
        if self.names is None:
            return found
        names, tie = self.names[places], self.ties[places]
        better, worse = names[:, :chosen], names[:, chosen:]
        forth, back = (_mixed(self.matter[places], each) for each in ((better, worse), (worse, better)))
        return found | {
            "pictures": len(np.unique(names)),
            "pictures_in_both_roles": len(np.intersect1d(better[~tie], worse[~tie])),
            "same_picture": int((better[:, :, None] == worse[:, None, :]).any((1, 2)).sum()),
            "duplicates": len(places) - len(np.unique(forth)),
            "contradictions": _contradictions(forth, back, tie) if 2 * chosen == pictures else 0,
        }


def _mixed(matter: np.ndarray, names: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 `[R]`, equal where matter and names are; 64 bits of a million rows hardly ever fall together."""
    out = matter.astype(np.uint64)
    for column in np.concatenate(names, axis=1).astype(np.uint64).T:
        out = (out ^ (out >> np.uint64(29))) * ODD + column * (ODD + np.uint64(2))
    return out


def _contradictions(forth: np.ndarray, back: np.ndarray, tie: np.ndarray) -> int:
    """Pairs of which a vote that is no tie came after one the other way round."""
    seen, first = np.unique(forth, return_index=True)
    where = np.minimum(np.searchsorted(seen, back), len(seen) - 1)
    against = (seen[where] == back) & (first[where] < np.arange(len(forth))) & (forth != back) & ~tie
    return len(np.unique(np.minimum(forth, back)[against]))


def read_texts(comparisons: Comparisons, seed: int) -> Texts | None:
    """Read all rows and no picture; seed: of the split. None where a picture lies outside of its row, or rows differ in shape.

    None too for sources of which rows cannot be read without their pictures.
    """
    if not pictures_apart(comparisons):
        return None
    found = _Found(len(comparisons), seed)
    for stretch in plain_pairs(comparisons):
        found.take(stretch)
    for place in np.flatnonzero(~found.read).tolist():
        try:
            comparison = comparisons[place]
        except DataError as error:
            found.bad[place] = str(error)
            continue
        if not comparison.in_row or not found.put(place, comparison):
            return None
    return found.texts()


def pictures_apart(comparisons: Comparisons) -> bool:
    """Whether a source is a table or archive that holds its pictures itself and gives its texts without them, as a first row
    says.
    """
    if not isinstance(comparisons.rows, ParquetRows | TarRows):
        return False
    for place in range(min(len(comparisons), 64)):
        try:
            comparison = comparisons[place]
        except DataError:
            continue
        return comparison.in_row and not any(hasattr(image, "data") for image in comparison.images)
    return False


class _Found:
    """What was read so far."""

    def __init__(self, count: int, seed: int) -> None:
        self.read, self.bad = np.zeros(count, bool), dict[int, str]()
        self._seed, self._shape = seed, (0, 0)
        self._prompts = np.full(count, -1, np.int64)
        self._ids, self._matter = np.zeros(count, np.int64), self._prompts
        self._ties = np.zeros(count, bool)
        self._names: np.ndarray | None = None

    def take(self, plain: Plain) -> None:
        """Pairs, the better picture first."""
        known: dict[str, int] = {}
        for prompt in plain.prompts:
            if prompt not in known:
                known[prompt] = key63(self._seed, "split", prompt)
        self._prompts[plain.places] = [known[prompt] for prompt in plain.prompts]
        if self._matter is not self._prompts:
            self._matter[plain.places] = self._prompts[plain.places]
        texts = zip(plain.prompts, *plain.names, strict=True)
        self._ids[plain.places] = _keys([f"{prompt}\x1f{better}\x1f{worse}" for prompt, better, worse in texts])
        self._ties[plain.places] = plain.ties
        self.read[plain.places] = True
        self._shape = (2, 1)
        if not plain.own:
            self._named()[plain.places] = np.stack([_keys(names) for names in plain.names], axis=1)

    def put(self, place: int, comparison: Comparison) -> bool:
        """False where it is of another shape than others were."""
        shape = len(comparison.images), comparison.num_chosen
        if self._shape not in ((0, 0), shape):
            return False
        self._shape = shape
        self._prompts[place] = key63(self._seed, "split", comparison.prompt)
        self._ids[place], self._ties[place] = comparison.id, comparison.is_tie
        if comparison.objective_weights and self._matter is self._prompts:
            self._matter = self._prompts.copy()
        if self._matter is not self._prompts:
            told = sorted((comparison.objective_weights or {}).items())
            self._matter[place] = key63(int(self._prompts[place]), *(f"{name}={value}" for name, value in told))
            if not told:
                self._matter[place] = self._prompts[place]
        self._named()[place] = [key63(image.name) for image in comparison.images]
        return True

    def _named(self) -> np.ndarray:
        """Keys of names; where a row's own stand, any that no other has."""
        if self._names is None:
            count = len(self.read) * self._shape[0]
            self._names = np.arange(-count - 1, -1, dtype=np.int64).reshape(-1, self._shape[0])
        return self._names

    def texts(self) -> Texts | None:
        if self._shape == (0, 0):
            return None
        return Texts(self._prompts, self._ids, self._ties, self._matter, self._names, self._shape, self.bad)


def _keys(texts: Sequence[str]) -> np.ndarray:
    """`key63` of each, whose parts are joined already."""
    whole = b"".join([blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts])
    return (np.frombuffer(whole, "<u8") >> np.uint64(1)).astype(np.int64)
