"""Pairs with nothing unusual about them, read from whole columns of a table or from the members of an archive.

A row is plain if all that a comparison would check of it can be seen at once; any other is left to be read by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flowalign.data.columns import OPTIONAL, PROMPTS, SIDED, TWO_SIDES
from flowalign.data.readers import Comparisons
from flowalign.data.records import TIE
from flowalign.data.rows import TarRows
from flowalign.data.tables import ParquetRows

PICK_A_PIC = ("jpg_0", "jpg_1")
RANGES = {"weight": (0.0, np.inf), "margin": (-np.inf, np.inf), "preference": (0.0, 1.0)}
"""Numbers that a pair may have."""
CHUNK = 65_536
"""Rows of an archive taken together."""


@dataclass(frozen=True)
class Plain:
    """Some pairs of a source."""

    places: np.ndarray
    """int64 `[r]`: places in the Comparisons."""
    prompts: Sequence[str]
    names: tuple[Sequence[str], Sequence[str]]
    """Of the better and of the worse picture."""
    ties: np.ndarray
    """bool `[r]`."""
    own: bool
    """No other row names one of the pictures."""


def plain_pairs(comparisons: Comparisons) -> Iterator[Plain]:
    """The plain ones of a source in its order, a stretch at a time."""
    rows, name = comparisons.rows, comparisons.convention.name
    sides = TWO_SIDES.get(name, PICK_A_PIC if name == "pick_a_pic" else None)
    place = _places(comparisons)
    renamed = comparisons.columns
    if sides is None or place is None or {*renamed} & {*renamed.values()}:
        return
    columns = _Columns(renamed, (sides[0], sides[1]))
    if len({*columns.pictures}) < 2:
        return
    if isinstance(rows, ParquetRows):
        stretches = _of_table(rows, columns)
    elif isinstance(rows, TarRows) and sides != PICK_A_PIC:
        stretches = _of_archive(rows, columns)
    else:
        return
    for numbers, plain in stretches:
        places = place[numbers]
        kept = places >= 0
        if not kept.all():
            plain = _only(plain, kept)
        if comparisons.order == "reversed":
            plain = replace(plain, names=plain.names[::-1])
        yield replace(plain, places=places[kept])


@dataclass(frozen=True)
class _Columns:
    """What a source calls the columns that matter."""

    renamed: dict[str, str]
    sides: tuple[str, str]

    def __call__(self, name: str) -> str:
        return self.renamed.get(name, name)

    @property
    def pictures(self) -> tuple[str, str]:
        return self(self.sides[0]), self(self.sides[1])

    @property
    def others(self) -> set[str]:
        """Columns that a comparison reads beside prompt and pictures, where pictures have two columns."""
        sided = {f"{side}_{name}" for side in self.sides for name in SIDED}
        return {self(name) for name in {*OPTIONAL, *sided}}


def _places(comparisons: Comparisons) -> np.ndarray | None:
    """Place of each row of the source in the Comparisons, -1 where it has none; None where a comparison has several rows."""
    count, index = len(comparisons.rows), comparisons.index
    if index is None:
        return np.arange(count)
    if index.ndim != 1 or len(np.unique(index)) < len(index):
        return None
    place = np.full(count, -1, np.int64)
    place[index] = np.arange(len(index))
    return place


def _only(plain: Plain, kept: np.ndarray) -> Plain:
    def of(texts: Sequence[str]) -> list[str]:
        return [text for text, keep in zip(texts, kept.tolist(), strict=True) if keep]

    better, worse = plain.names
    return replace(plain, prompts=of(plain.prompts), names=(of(better), of(worse)), ties=plain.ties[kept])


def _of_table(rows: ParquetRows, columns: _Columns) -> Iterator[tuple[np.ndarray, Plain]]:
    pick = columns.sides == PICK_A_PIC
    pictures, prompts = columns.pictures, [columns(name) for name in PROMPTS if columns(name) in rows.columns]
    more = {"label_0", "label_1", "has_label", "image_0_uid", "image_1_uid"} if pick else columns.others
    needed = sorted({columns(name) for name in more} & {*rows.columns})
    if not {*pictures} <= {*rows.pictures} or {*needed, *prompts} & {*rows.pictures}:
        return
    for first, table in rows.stretches(sorted({*prompts, *needed})):
        texts, plain = _prompts(table, prompts)
        numbers = np.arange(first, first + len(table))
        names = [[f"{number}:{column}" for number in numbers.tolist()] for column in pictures]
        own, ties = True, np.zeros(len(table), bool)
        if pick:
            labels = [_numbers(table, columns(name)) for name in ("label_0", "label_1")]
            with np.errstate(invalid="ignore"):
                plain &= (np.minimum(*labels) >= 0) & (np.abs(labels[0] + labels[1] - 1) <= 1e-6) & (np.maximum(*labels) <= 1)
                turned, ties = labels[1] > labels[0], np.maximum(*labels) == TIE
            if "has_label" in needed:
                plain &= _told(table, "has_label")
            for side, name in enumerate(("image_0_uid", "image_1_uid")):
                if name in needed:
                    plain &= pa.types.is_string(table.schema.field(name).type) | _missing(table, name)
                    uids, own = table.column(name).to_pylist(), False
                    names[side] = [uid or given for uid, given in zip(uids, names[side], strict=True)]
            names = _turned(names, turned)
        else:
            for name in needed:
                plain &= _fits(table, name, columns)
            preference = columns("preference")
            ties = _numbers(table, preference) == TIE if preference in needed else ties
        found = Plain(numbers, texts, (names[0], names[1]), ties, own)
        yield numbers[plain], found if plain.all() else _only(found, plain)


def _prompts(table: pa.Table, names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The first of these columns that is not null in each row, and where it is text that is not empty."""
    texts: list[str | None] = [None] * len(table)
    for name in reversed(names):
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return [""] * len(table), np.zeros(len(table), bool)
        given = table.column(name).to_pylist()
        texts = given if None not in given else [a if a is not None else b for a, b in zip(given, texts, strict=True)]
    return [text or "" for text in texts], np.array([bool(text and not text.isspace()) for text in texts], bool)


def _missing(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table.column(name).is_null().to_numpy())


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """float64, NaN where there is none or nothing that certainly is one."""
    kind = table.schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return np.full(len(table), np.nan)
    return np.asarray(pc.cast(table.column(name), pa.float64(), safe=False).to_numpy(), np.float64)


def _told(table: pa.Table, name: str) -> np.ndarray:
    """Not false."""
    if not pa.types.is_boolean(table.schema.field(name).type):
        return _missing(table, name)
    return np.asarray(pc.fill_null(table.column(name), True).to_numpy(), bool)


def _fits(table: pa.Table, name: str, columns: _Columns) -> np.ndarray:
    """Where a column that a comparison reads is null or certainly what it must be."""
    missing, kind = _missing(table, name), table.schema.field(name).type
    for number, (low, high) in RANGES.items():
        if columns(number) == name:
            values = _numbers(table, name)
            return missing | (np.isfinite(values) & (values >= low) & (values <= high))
    if name == columns("generator") and pa.types.is_string(kind):
        return np.ones(len(table), bool)
    if name == columns("seed") and pa.types.is_integer(kind):
        return np.ones(len(table), bool)
    return missing


def _turned(names: Sequence[list[str]], turned: np.ndarray) -> list[list[str]]:
    first, second = names
    pairs = [(b, a) if turn else (a, b) for a, b, turn in zip(first, second, turned.tolist(), strict=True)]
    return [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]


def _of_archive(rows: TarRows, columns: _Columns) -> Iterator[tuple[np.ndarray, Plain]]:
    """Rows that hold one prompt as text and both pictures, and else nothing that a comparison reads."""
    prompts, pictures = [columns(name) for name in PROMPTS], columns.pictures
    roles = []
    for suffix in rows.suffixes:
        column, kind = rows.column_of(suffix)
        if kind == "text" and column in prompts:
            roles.append(1)
        elif kind == "picture" and column in pictures:
            roles.append(2 << pictures.index(column))
        elif kind == "table" or column in {*prompts, *pictures, *columns.others}:
            roles.append(64)
        else:
            roles.append(0)
    role, (first, kinds, offsets, sizes, shards) = np.array(roles, np.int64), rows.members()
    for start in range(0, len(rows), CHUNK):
        numbers = np.arange(start, min(start + CHUNK, len(rows)))
        base, begins = int(first[numbers[0]]), first[numbers] - first[numbers[0]]
        mine = kinds[base : int(first[numbers[-1] + 1])]
        given = role[mine]
        plain = (np.add.reduceat(given, begins) == 7) & (np.add.reduceat(given > 0, begins) == 3)
        at = [np.maximum.reduceat(np.where(given == each, np.arange(len(mine)), 0), begins) for each in (1, 2, 4)]
        wanted = offsets[base + at[0]], sizes[base + at[0]]
        texts = _read(rows.paths, shards[numbers].tolist(), plain, wanted)
        plain &= np.array([bool(text) for text in texts], bool)
        names = [
            [f"{number}:{rows.suffixes[kind]}" for number, kind in zip(numbers.tolist(), mine[each].tolist(), strict=True)]
            for each in at[1:]
        ]
        found = Plain(numbers, texts, (names[0], names[1]), np.zeros(len(numbers), bool), True)
        yield numbers[plain], found if plain.all() else _only(found, plain)


def _read(paths: Sequence[object], shards: Sequence[int], plain: np.ndarray, where: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """The texts at these offsets and sizes, stripped; empty where a row is not plain or its text cannot be read whole."""
    texts: list[str] = []
    current, opened = -1, -1
    try:
        for shard, wanted, offset, size in zip(shards, plain.tolist(), *(each.tolist() for each in where), strict=True):
            path = paths[shard]
            if not wanted or not isinstance(path, Path):
                texts.append("")
                continue
            if shard != current:
                if opened >= 0:
                    os.close(opened)
                opened, current = os.open(path, os.O_RDONLY), shard
            data = os.pread(opened, size, offset)
            texts.append(data.decode("utf-8", "replace").strip() if len(data) == size else "")
    except OSError:
        texts += [""] * (len(shards) - len(texts))  # read one by one, they say what is wrong
    finally:
        if opened >= 0:
            os.close(opened)
    return texts
