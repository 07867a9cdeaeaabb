"""Rows of JSON files and WebDataset archives, read one at a time: only an index of offsets is held in memory."""

from __future__ import annotations

import json
import re
import tarfile
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flowalign.data.records import SpanImage
from flowalign.data.remote import Place, mapped
from flowalign.errors import DataError

BLOCK = 512
"""Bytes of a tar header; files fill multiples of it."""
AHEAD = 8192
"""Bytes read at a header: of small files there are several in them."""
PICTURES = {"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"}
ARRAYS = {"npy", "safetensors"}


class Rows(ABC):
    """A source as numbered rows. Picture cells are ImageRefs, bytes, `{bytes, path}` or strings; all else plain values."""

    columns: tuple[str, ...]
    folder: Place
    """What relative paths in the rows are relative to."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> dict[str, Any]:
        """Column -> value. Raises DataError if the row cannot be parsed."""

    @abstractmethod
    def where(self, number: int) -> str:
        """The row's place for error messages, as in "votes.jsonl:17"."""


class JsonRows(Rows):
    """JSON lines, or one JSON array of objects. Holds two integers per row.

    Keys follow the ImageFolder convention: `file_name` is column `image`, `chosen_file_name` is `chosen`, and so on.
    Raises DataError for a file that is missing, empty or not JSON.
    """

    def __init__(self, path: Place) -> None:
        self.path, self.folder = path, path.parent
        self._starts, self._lines = array("q"), array("q")
        with open_file(path):
            if not path.stat().st_size:
                raise DataError(f"{str(path)!r} is empty; it must hold one JSON object per line")
        self._bytes = mapped(path)
        if self._bytes[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            self._index_array()
        else:
            offset = 0
            for line, text in enumerate(iter(self._bytes.readline, b""), 1):
                if text.strip():
                    self._starts.append(offset)
                    self._lines.append(line)
                offset += len(text)
            self._starts.append(offset)
        columns: dict[str, None] = {}
        for number in range(min(len(self), 64)):
            try:
                columns |= dict.fromkeys(self.row(number))
            except DataError:
                continue  # reported when the row is read
        self.columns = tuple(columns)

    def _index_array(self) -> None:
        # As Latin-1 every byte is one character, so positions are byte offsets; UTF-8 never hides an ASCII byte.
        text, decoder, space = self._bytes[:].decode("latin-1"), json.JSONDecoder(), re.compile(r"[ \t\r\n,]*")
        position = space.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
        try:
            while text[position] != "]":
                self._starts.append(position)
                self._lines.append(len(self._starts))
                position = space.match(text, decoder.raw_decode(text, position)[1]).end()  # type: ignore[union-attr]
        except (ValueError, IndexError) as error:
            raise DataError(
                f"{str(self.path)!r} is not a JSON array of objects ({error}); repair it or use JSON lines"
            ) from None
        self._starts.append(position)

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, number: int) -> dict[str, Any]:
        try:
            values = json.loads(
                self._bytes[self._starts[number] : self._starts[number + 1]].decode("utf-8-sig").strip(" \t\r\n,")
            )
        except ValueError as error:
            raise DataError(f"not valid JSON ({error}); repair or remove the row") from None
        if not isinstance(values, dict):
            raise DataError(f"a row must be a JSON object and this one is {type(values).__name__}; repair or remove the row")
        return {_folder_column(name): value for name, value in values.items()}

    def where(self, number: int) -> str:
        return f"{self.path.name}:{self._lines[number]}"


class TarRows(Rows):
    """WebDataset shards: consecutive members with one name up to the first dot are one row.

    `0001.chosen.png` is column `chosen`, `0001.jpg_0` is `jpg_0`, `0001.txt` is `prompt`, `0001.label_0.txt` is `label_0`;
    the keys of `0001.json` are columns as well. Raises DataError for archives that are damaged or compressed.
    """

    def __init__(self, paths: Sequence[Place]) -> None:
        self.paths, self.folder = list(paths), paths[0].parent
        self.suffixes: tuple[str, ...] = ()
        self._offsets, self._sizes, self._kinds = array("q"), array("q"), array("i")  # per member
        self._first, self._shards = array("q"), array("i")  # per row
        self._shard_rows = array("q")  # number of the shard's first row
        kinds: dict[str, int] = {}
        for shard, path in enumerate(self.paths):
            self._shard_rows.append(len(self._shards))
            previous = "", "\0"  # what no name is
            for name, offset, size in _members(path):
                folder, _, base = name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if stem != previous[1] or folder != previous[0]:
                    previous = folder, stem
                    self._first.append(len(self._offsets))
                    self._shards.append(shard)
                self._offsets.append(offset)
                self._sizes.append(size)
                self._kinds.append(kinds.setdefault(suffix, len(kinds)))
        self._first.append(len(self._offsets))
        self.suffixes = tuple(kinds)
        columns: dict[str, None] = {}
        for number in range(min(len(self), 16)):
            try:
                columns |= dict.fromkeys(self.row(number))
            except DataError:
                continue  # reported when the row is read
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self._shards)

    def row(self, number: int) -> dict[str, Any]:
        path = self.paths[self._shards[number]]
        values: dict[str, Any] = {}
        for member in range(self._first[number], self._first[number + 1]):
            suffix = self.suffixes[self._kinds[member]]
            span = SpanImage(f"{number}:{suffix}", path, self._offsets[member], self._sizes[member])
            column, kind = self.column_of(suffix)
            if kind == "text":
                values[column] = span.read().decode("utf-8", "replace").strip()
            elif kind == "table":
                try:
                    values |= json.loads(span.read())
                except (ValueError, TypeError) as error:
                    raise DataError(f"its .json member is not a JSON object ({error}); repair or remove the sample") from None
            else:
                values[column] = span
        return values

    @staticmethod
    def column_of(suffix: str) -> tuple[str, str]:
        """Name of the column that a member with this suffix fills, and what it is: picture, array, text, table or other."""
        column, _, ending = suffix.rpartition(".")
        if ending.lower() in PICTURES:
            return column or "image", "picture"
        if ending in ARRAYS:
            return column or "noise", "array"
        if ending == "txt":
            return column or "prompt", "text"
        return suffix, "table" if ending == "json" else "other"

    def members(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each row its first member (and the end of the last), of each member its place in `suffixes`, offset and size, of
        each row its place in `paths`.
        """
        first, offsets, sizes = (np.frombuffer(each, np.int64) for each in (self._first, self._offsets, self._sizes))
        kinds, shards = (np.frombuffer(each, np.int32) for each in (self._kinds, self._shards))
        return first, kinds, offsets, sizes, shards

    def where(self, number: int) -> str:
        shard = self._shards[number]
        return f"{self.paths[shard].name}:{number - self._shard_rows[shard]}"


def open_file(path: Place) -> Any:
    """The file, open for reading bytes. Raises DataError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}); check the path") from None


def _members(path: Place) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file. Plain headers, of which there may be millions, are read here; others by tarfile."""
    try:
        with path.open("rb") as file:
            end, at, begin, read = file.seek(0, 2), 0, 0, b""
            while True:
                if at + BLOCK > begin + len(read):
                    begin, read = file.seek(at), file.read(AHEAD)
                header = read[at - begin : at - begin + BLOCK]
                plain = _plain(header)
                if plain is None:
                    break
                name, size = plain
                yield name, at + BLOCK, size
                at += BLOCK - (-size // BLOCK) * BLOCK
                if at > end:
                    raise tarfile.ReadError("unexpected end of data")
            if not header.strip(b"\0") and end:
                return
            file.seek(at)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep an object for every member
                    if member.isfile():
                        yield member.name, member.offset_data, member.size
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is not an uncompressed tar archive ({error}); unpack or fetch it again") from None


def _plain(header: bytes) -> tuple[str, int] | None:
    """Name and size of a regular file with nothing unusual about it, from its header; None for all else."""
    if len(header) < BLOCK or header[257:262] != b"ustar" or header[156] not in b"0\0" or header[345] or header[124] > 55:
        return None
    return header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), int(header[124:135], 8)


def _folder_column(name: str) -> str:
    if name == "file_name":
        return "image"
    return name.removesuffix("_file_name").removesuffix("_file_names") if name != "file_names" else "images"
