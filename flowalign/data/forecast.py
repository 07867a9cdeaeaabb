"""How much room a cache will take, said once a first entry of each kind shows how large they are."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from flowalign.data.records import Comparison, key63
from flowalign.errors import DataError

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
KINDS: dict[str, Callable[[Comparison], Iterable[str]]] = {
    "pictures": lambda comparison: (image.name for image in comparison.images),
    "prompts": lambda comparison: (comparison.prompt,),
}

Count = Callable[[np.ndarray], Mapping[str, int]]
"""Places in the comparisons -> how many distinct ones of each of KINDS they name."""


class Forecast:
    """Bytes that the rest of a fill will write: distinct pictures times their variants, and distinct prompts.

    Pictures are told apart by their names, so nothing is opened; what is cached already is counted all the same. Rows are read
    once: what is to come of one kind is counted when a first entry of the other is written, if that is earlier.
    """

    def __init__(self, folder: Path, comparisons: Sequence[Comparison], *, show: bool, count: Count | None = None) -> None:
        """count: says without reading rows what these places name."""
        self._folder, self._comparisons, self._show, self._count = folder, comparisons, show, count or self._read
        self._planned: dict[str, int] = {}
        self._named: dict[str, int] = {}

    def check(self, kind: str, entry: Path, places: np.ndarray, variants: int = 1) -> None:
        """Say, once for each of KINDS, what `places` will take if every entry is as large as `entry`.

        Raises DataError where the disk has not that much room.
        """
        if kind in self._planned:
            return
        self._named = self._named or dict(self._count(places))
        count = self._named[kind] * variants
        self._planned[kind] = count * entry.stat().st_size
        free, whole = shutil.disk_usage(self._folder).free, sum(self._planned.values())
        told = f"caching {count} more {kind} takes about {amount(self._planned[kind])}"
        if whole > free:
            raise DataError(
                f"{told}, {amount(whole)} in all, and {str(self._folder)!r} has {amount(free)} left; free some, name another "
                "folder with data.cache, or use fewer comparisons with data.limit"
            )
        if self._show:
            tqdm.write(f"{told}; {str(self._folder)!r} has {amount(free)} left", file=sys.stderr)

    def _read(self, places: np.ndarray) -> dict[str, int]:
        found: dict[str, set[int]] = {kind: set() for kind in KINDS}
        for place in places.tolist():
            try:
                comparison = self._comparisons[place]
            except DataError:
                continue
            for kind, names in KINDS.items():
                found[kind].update(key63(name) for name in names(comparison))
        return {kind: len(names) for kind, names in found.items()}


def amount(size: float) -> str:
    """Bytes as people read them, such as "3.2 GiB"."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{size:.0f} {UNITS[unit]}"
