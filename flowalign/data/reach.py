"""Which comparisons a run sees, so that the pictures of no others need be read before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flowalign.data.cached import Among, Cached, digest, joined
from flowalign.data.readers import BadRow
from flowalign.data.texts import Texts
from flowalign.errors import NoneUsableError
from flowalign.rng import Keyed


@dataclass(frozen=True)
class Reach:
    """How far a run looks into its training data."""

    positions: int
    """Comparisons of its endless sequence, see `PairStream`, from the first on."""
    first: int
    """Comparisons from the first on as the source has them, see `sequential`."""
    prompts: int
    """Distinct prompts from the first on."""


@dataclass(frozen=True)
class Usable:
    """The n comparisons that there are to train on, as far as their fields say, found without opening a picture."""

    rows: np.ndarray
    """int64 `[n]`: places in the Comparisons, in order."""
    prompts: np.ndarray
    """int64 `[n]`: equal for equal prompts."""
    ids: str
    """A hash of the comparisons' ids."""
    bad: tuple[BadRow, ...]
    """Rows whose fields cannot be used."""

    @classmethod
    def of(cls, texts: Texts, rows: np.ndarray) -> Usable:
        """Those of `rows` that can be read."""
        good = rows[texts.prompts[rows] >= 0]
        bad = tuple(BadRow(place, texts.bad[place]) for place in sorted(texts.bad))
        return cls(good, texts.prompts[good], digest(texts.ids[good]), bad)

    def __len__(self) -> int:
        return len(self.rows)

    def reached(self, seed: int, reach: Reach, broken: np.ndarray) -> np.ndarray:
        """bool `[n]`: those that a run needs, given which are known to be broken, bool `[n]`; broken ones may be among them.

        More than an epoch needs all of them. What is needed does not depend on what else is prepared.
        """
        good = np.flatnonzero(~broken)
        if reach.positions >= len(good):
            return np.ones(len(self), bool)
        order = Keyed(seed).permutation("order", 0, len(self)).numpy()
        out = np.zeros(len(self), bool)
        out[order[: np.searchsorted(np.cumsum(~broken[order]), reach.positions) + 1]] = True
        out[good[: reach.first]] = True
        if reach.prompts:
            out[good[np.sort(np.unique(self.prompts[good], return_index=True)[1])[: reach.prompts]]] = True
        return out


@dataclass(frozen=True)
class Tried:
    """What was prepared of the usable comparisons, in one or several goes."""

    usable: Usable
    cached: Cached | None = None
    """Those that can be used; None while there are none."""
    broken: tuple[BadRow, ...] = ()
    """Those with a picture that cannot be used."""

    def _mask(self, rows: np.ndarray) -> np.ndarray:
        out = np.zeros(len(self.usable), bool)
        out[np.searchsorted(self.usable.rows, rows)] = True
        return out

    @property
    def broken_rows(self) -> np.ndarray:
        """bool `[n]`"""
        return self._mask(np.array([row.row for row in self.broken], np.int64))

    @property
    def good_rows(self) -> np.ndarray:
        """bool `[n]`"""
        return self._mask(np.empty(0, np.int64) if self.cached is None else self.cached.indices)

    def missing(self, reached: np.ndarray) -> np.ndarray:
        """Places in the Comparisons of what is reached and was not tried, in order."""
        return self.usable.rows[reached & ~self.good_rows & ~self.broken_rows]

    def more(self, cached: Cached | None, broken: tuple[BadRow, ...]) -> Tried:
        """With what a further fill found."""
        both = cached if self.cached is None or cached is None else joined(self.cached, cached)
        bad = sorted((*self.broken, *broken), key=lambda row: row.row)
        return Tried(self.usable, both or self.cached, tuple(bad))

    def of(self, reached: np.ndarray) -> Cached:
        """The comparisons of a run that reaches these, the broken ones known; all that it reaches was tried.

        Raises NoneUsableError where there are none.
        """
        if self.cached is None:
            raise NoneUsableError((*self.usable.bad, *self.broken))
        good, broken = self.good_rows, self.broken_rows
        places = np.flatnonzero(good)
        kept = self.cached.only(reached[places])
        among = Among(len(self.usable), places[reached[places]], np.flatnonzero(broken), self.usable.ids)
        bad = sorted((*self.usable.bad, *self.broken), key=lambda row: row.row)
        return replace(kept, among=among, bad=tuple(bad))


def some_of(count: int, at_most: int | None, seed: int) -> np.ndarray:
    """int64, ascending: all places of `count` comparisons, or `at_most` of them by a keyed choice."""
    if at_most is None or count <= at_most:
        return np.arange(count)
    return np.sort(Keyed(seed).permutation("validation", 0, count).numpy()[:at_most])
