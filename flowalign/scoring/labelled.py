"""`Labelled`: pairs of comparisons whose pictures are rows of a score table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowalign.data.records import Comparison
from flowalign.data.writer import address
from flowalign.errors import DataError
from flowalign.scoring.table import ScoreTable


@dataclass(frozen=True)
class Labelled:
    """Pairs of rows of a table, and which of the two was preferred."""

    first: NDArray[np.int64]
    """`[n]` rows."""
    second: NDArray[np.int64]
    """`[n]` rows."""
    label: NDArray[np.float64]
    """`[n]` the probability that the first is preferred."""
    prompts: tuple[str, ...]
    """`[n]`"""
    given: int
    """Pairs that there were; the others' pictures are not in the table, or their rows cannot be read."""

    def __len__(self) -> int:
        return len(self.label)


def match(table: ScoreTable, comparisons: Sequence[Comparison]) -> Labelled:
    """Find the pictures of comparisons in a table: by path and prompt, else by content and prompt.

    Groups count as all their pairs of a chosen and a rejected picture, ranked lists as all pairs of unequal grades; a picture
    that was judged alone is no pair. Files name the chosen picture first, which must not look like a liking for the first
    place: every second pair is turned around.
    """
    prompts = [str(prompt) for prompt in table.texts("prompt")]
    rows: dict[tuple[str, str], int] = {}
    for column in ("image", "path"):  # where both say something, the path is the nearer one
        found = zip(table.texts(column), prompts, strict=True)
        rows |= {(f"{column} {value}", prompt): row for row, (value, prompt) in enumerate(found) if value is not None}
    pairs: list[tuple[int, int, float, str]] = []
    given = 0
    for place in range(len(comparisons)):
        try:
            comparison = comparisons[place]
        except DataError:
            given += 1
            continue
        wanted = list(_pairs(comparison))
        given += len(wanted)
        known = {number: _row(rows, comparison, number) for number in {each for pair in wanted for each in pair}}
        for better, worse in wanted:
            a, b, label = known[better], known[worse], comparison.preference
            if a is None or b is None:
                continue
            pairs.append((b, a, 1 - label, comparison.prompt) if len(pairs) % 2 else (a, b, label, comparison.prompt))
    first, second, label, prompt = zip(*pairs, strict=True) if pairs else ((), (), (), ())
    numbers = (np.array(each, np.int64) for each in (first, second))
    return Labelled(*numbers, np.array(label, float), tuple(prompt), given)


def _pairs(comparison: Comparison) -> Iterator[tuple[int, int]]:
    """(better, worse) pictures, by their places."""
    count, grades = len(comparison.images), comparison.grades
    for better in range(count if grades is not None else min(comparison.num_chosen, count)):
        for worse in range(better + 1 if grades is not None else comparison.num_chosen, count):
            if grades is None or grades[better] > grades[worse]:
                yield better, worse


def _row(rows: dict[tuple[str, str], int], comparison: Comparison, number: int) -> int | None:
    image = comparison.images[number]
    row = rows.get((f"path {address(image)}", comparison.prompt))
    if row is not None:
        return row
    try:
        return rows.get((f"image {hashlib.sha256(image.read()).hexdigest()}", comparison.prompt))
    except DataError:  # the picture is gone
        return None
