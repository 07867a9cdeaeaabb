"""Rows of Parquet shards and of `datasets` data sets; pictures are read only when they are asked for."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flowalign.data.records import CellImage, FileImage
from flowalign.data.remote import Place, beside, whole
from flowalign.data.rows import Rows, open_file
from flowalign.errors import DataError, reason

BLOCK = 32
"""Rows of a Parquet table that become Python objects together; few, as a run may want one row in sixty."""
TABLE_BYTES = 128 * 2**20
"""Row groups kept in memory per Parquet source; of the one that is being read, all columns are kept whatever their size."""


class ParquetRows(Rows):
    """Parquet shards in the order given. `pictures`, columns (binary or {bytes, path}), are read only when one is asked for.

    What is read at a time is one row group of one column. Raises DataError for files that are not Parquet, and for shards with
    other columns than the first, in whatever order.
    """

    def __init__(self, paths: Sequence[Place]) -> None:
        self.paths, self.folder = list(paths), paths[0].parent
        groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        schemas: list[pa.Schema] = []
        for shard, path in enumerate(self.paths):
            with open_file(path) as opened:
                try:
                    with pq.ParquetFile(path if isinstance(path, Path) else opened) as file:
                        metadata, schema = file.metadata, file.schema_arrow
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{str(path)!r} is not a Parquet file ({reason(error)}); fetch or write it again") from None
            schemas += [] if shard else [schema]
            if {*schema.names} != {*schemas[0].names}:  # what one has and another lacks would be lost, or fail in the middle
                raise DataError(_unlike(self.paths[0], schemas[0].names, path, schema.names))
            groups += [(shard, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._groups = groups
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        first = [i for i, (_, group) in enumerate(groups) if group == 0]  # empty shards have no group
        self._shard_starts = starts[first].tolist()
        self._bounds = starts.tolist()  # bisect takes a tenth of numpy's time for one number
        (schema,) = schemas
        self.columns = tuple(schema.names)
        self.pictures = tuple(field.name for field in schema if _is_picture(field.type))
        self._plain = tuple(name for name in self.columns if name not in self.pictures)
        self._tables: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._block: tuple[tuple[int, int], list[dict[str, Any]]] = ((-1, -1), [])
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def row(self, number: int) -> dict[str, Any]:
        group, place = self._locate(number)
        block = self._block
        if block[0] != (group, place // BLOCK):
            table = self._table(group, self._plain)
            start = place - place % BLOCK
            rows = table.slice(start, BLOCK).to_pylist() if self._plain else [{}] * BLOCK
            block = self._block = ((group, place // BLOCK), rows)
        return block[1][place % BLOCK] | {
            name: CellImage(f"{number}:{name}", table=self, row=number, column=name) for name in self.pictures
        }

    def cell(self, row: int, column: str) -> bytes:
        if column not in self.columns:
            raise DataError(f"{self.paths[0].name} has no column {column!r}; its columns are {', '.join(self.columns)}")
        if not 0 <= row < len(self):
            raise DataError(f"{self.paths[0].name} has rows 0 to {len(self) - 1}, not {row}; correct the reference")
        group, place = self._locate(row)
        return payload(self._table(group, (column,)).column(column)[place].as_py(), self.folder)

    def stretches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """These columns of all rows, a row group at a time, each with the number of its first row; nothing is kept."""
        for group, (shard, place) in enumerate(self._groups):
            path = self.paths[shard]
            try:
                with pq.ParquetFile(path if isinstance(path, Path) else path.open("rb")) as file:
                    table = file.read_row_group(place, columns=list(columns), use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"cannot read {str(path)!r} ({reason(error)}); fetch it again") from None
            yield self._bounds[group], table

    def where(self, number: int) -> str:
        shard, row = self._in_shard(number)
        return f"{self.paths[shard].name}:{row}"

    def address(self, row: int, column: str) -> str:
        """The cell as `FILE.parquet#ROW:COLUMN`, which a comparison can name."""
        shard, place = self._in_shard(row)
        return f"{whole(self.paths[shard])}#{place}:{column}"

    def _in_shard(self, number: int) -> tuple[int, int]:
        """(shard, row in it)"""
        shard, _ = self._groups[self._locate(number)[0]]
        return shard, number - self._shard_starts[bisect_right(self._shard_starts, number) - 1]

    def _locate(self, number: int) -> tuple[int, int]:
        group = bisect_right(self._bounds, number) - 1
        return group, number - self._bounds[group]

    def _table(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        with self._lock:  # also keeps several threads from reading the same row group at once
            if (group, columns) not in self._tables:
                shard, place = self._groups[group]
                path = self.paths[shard]
                try:
                    with pq.ParquetFile(path if isinstance(path, Path) else path.open("rb")) as file:
                        table = file.read_row_group(place, columns=list(columns), use_threads=False)
                except (pa.ArrowException, OSError, KeyError) as error:
                    raise DataError(f"cannot read {str(path)!r} ({reason(error)}); fetch it again") from None
                self._tables[group, columns] = table
                room = TABLE_BYTES - sum(kept.nbytes for kept in self._tables.values())
                for old in [each for each in self._tables if each[0] != group]:
                    if room >= 0:
                        break
                    room += self._tables.pop(old).nbytes
            self._tables.move_to_end((group, columns))
            return self._tables[group, columns]


class DatasetRows(Rows):
    """A split of a `datasets` data set: a folder written by `save_to_disk`, or anything `load_dataset` takes.

    Raises DataError with the library's first sentence if it cannot be loaded, for example without a network.
    """

    def __init__(self, source: str, split: str) -> None:
        import datasets  # slow to import, and only this kind of source needs it

        self.folder = Path(source)
        self.name = self.folder.name if self.folder.exists() else source  # a row's place is for people, and no path of a file
        saved = any((self.folder / name).exists() for name in ("state.json", "dataset_dict.json"))
        try:
            data: Any = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, split=split)
        except Exception as error:  # the library and the network raise dozens of kinds
            said = f"cannot load data set {source!r}, split {split!r} ({reason(error)})"
            raise DataError(f"{said}; check the name and the network, or pass a local file") from None
        if isinstance(data, Mapping):
            if split not in data:
                raise DataError(f"data set {source!r} has no split {split!r}; its splits are {', '.join(data)}")
            data = data[split]
        pictures = []
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
                pictures.append(column)
            elif isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"):
                pictures.append(column)
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
        self.columns, self._pictures, self._data = tuple(data.column_names), pictures, data
        self._plain = data.remove_columns(pictures)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._data)

    def row(self, number: int) -> dict[str, Any]:
        with self._lock:
            values = dict(self._plain[number]) if self._plain.column_names else {}
        return values | {name: CellImage(f"{number}:{name}", table=self, row=number, column=name) for name in self._pictures}

    def cell(self, row: int, column: str) -> bytes:
        with self._lock:
            value = self._data.select_columns([column])[row][column]
        return payload(value, self.folder)

    def where(self, number: int) -> str:
        return f"{self.name}:{number}"


def _unlike(first: Place, columns: Sequence[str], other: Place, others: Sequence[str]) -> str:
    """How a shard's columns differ from the first one's."""
    more, less = ([name for name in one if name not in two] for one, two in ((others, columns), (columns, others)))
    said = [f"{word} {', '.join(names)}" for word, names in (("also has", more), ("lacks", less)) if names]
    return f"{str(other)!r} {' and '.join(said)}, unlike {first.name}; write all shards with the same columns"


def payload(value: Any, folder: Place) -> bytes:
    """A picture cell's bytes: bytes, `{bytes, path}`, an address or a path relative to `folder`. Raises DataError."""
    path = value
    if isinstance(value, Mapping):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(path, str) and path:
        return FileImage(path, beside(folder, path)).read()
    raise DataError(f"a picture cell holds {type(value).__name__} instead of picture bytes or a path; repair or remove the row")


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
