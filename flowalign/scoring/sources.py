"""What is to be scored: pictures with their prompts, one at a time, from a folder, a table, an archive or comparisons.

Nothing is read before it is asked for. A picture's `path` in a score table is where it can be found again: a path, a cell
`FILE.parquet#ROW:COLUMN`, or, inside an archive or a data set, the row's place for people to read.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.data.columns import PROMPTS, Pictures, detect
from flowalign.data.readers import Comparisons, open_comparisons, open_rows
from flowalign.data.records import FileImage, ImageRef, key63
from flowalign.data.remote import Place, at, whole
from flowalign.data.rows import PICTURES, Rows
from flowalign.data.writer import address
from flowalign.errors import DataError, allowed
from flowalign.scoring.table import RAW, is_score_table

IMAGE_COLUMNS = ("image", "file_name", "picture", "path", "image_path", "img", "png", "jpg", "jpeg", "webp")
"""Names that the column of pictures goes by, likeliest first."""
GENERATORS = ("generator", "model")


@dataclass(frozen=True)
class Item:
    """A picture and what is known about it."""

    image: ImageRef | None
    """None where the row that should name it cannot be used."""
    path: str
    prompt: str | None = None
    generator: str | None = None
    seed: int | None = None


class Items(ABC):
    """Pictures by their place; reading a bad row raises DataError, and `where` says which one it is."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, place: int) -> Item:
        """Raises DataError if the row cannot be used."""

    @abstractmethod
    def where(self, place: int) -> str:
        """The row's place for people, as in "metadata.jsonl:17"."""


class FolderItems(Items):
    """All picture files below a folder, sorted by name; the prompt of `a.png` is what `a.txt` beside it says."""

    def __init__(self, folder: Path, prompt: str | None) -> None:
        self.folder, self._prompt = folder, prompt
        found = (Path(place, name) for place, *names in os.walk(folder) for name in (*names[0], *names[1]))
        pictures = (path for path in found if path.suffix.lower().lstrip(".") in PICTURES)
        self._files = sorted(path.relative_to(folder).as_posix() for path in pictures)  # as text, a fifth of a path's size
        if not self._files:
            raise DataError(f"{folder} holds no picture ({', '.join(sorted(PICTURES))}); check the path.")
        self._last = self._located(folder / self._files[0])
        """A folder, and where that is: following links for every picture costs a tenth of reading a small one."""

    def __len__(self) -> int:
        return len(self._files)

    def item(self, place: int) -> Item:
        path = self.folder / self._files[place]
        parent, located = self._last
        if parent != path.parent:
            parent, located = self._last = self._located(path)
        return Item(FileImage(str(path), path), str(located / path.name), self._prompt or _beside(path))

    def _located(self, path: Path) -> tuple[Path, Path]:
        return path.parent, Path(str(whole(path))).parent

    def where(self, place: int) -> str:
        return self._files[place]


class RowItems(Items):
    """One picture a row of a table or archive."""

    def __init__(self, rows: Rows, image: str, prompt: str | None, told: str | None) -> None:
        """image, prompt: columns; told: the prompt of all pictures, instead of a column's."""
        self.rows, self._image, self._prompt, self._told = rows, image, prompt, told
        self._pictures = Pictures(rows.folder)

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, place: int) -> Item:
        row = self.rows.row(place)
        value = row.get(self._image)
        if value is None:
            raise DataError(f"column {self._image!r} is missing or null; fill it in or remove the row")
        ref = self._pictures.ref(value, f"{place}:{self._image}")
        prompt = self._told if self._told is not None else row.get(self._prompt) if self._prompt else None
        generator = next((str(row[name]) for name in GENERATORS if row.get(name) is not None), None)
        if prompt is not None and not isinstance(prompt, str):
            raise DataError(f"the prompt is {prompt!r}; it must be text")
        return Item(ref, address(ref) or self.where(place), prompt, generator, _seed(row.get("seed")))

    def where(self, place: int) -> str:
        return self.rows.where(place)


class ComparisonItems(Items):
    """Every picture of comparisons with its prompt, each once. Which there are is found by reading all rows, no picture.

    What is held of a picture are three integers.
    """

    def __init__(self, comparisons: Comparisons, told: str | None) -> None:
        self._comparisons, self._told = comparisons, told
        identities, rows, numbers = array("q"), array("q"), array("q")
        for row in range(len(comparisons)):
            try:
                comparison = comparisons[row]
                found = [key63(told or comparison.prompt, image.name) for image in comparison.images]
            except DataError:  # its item says what is wrong
                found = [-1 - row]
            identities.extend(found)
            rows.extend([row] * len(found))
            numbers.extend(range(len(found)))
        first = np.sort(np.unique(np.frombuffer(identities, dtype=np.int64), return_index=True)[1])
        self._rows, self._numbers = (np.frombuffer(each, dtype=np.int64)[first] for each in (rows, numbers))

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, place: int) -> Item:
        number = int(self._numbers[place])
        comparison = self._comparisons[int(self._rows[place])]
        ref = comparison.images[number]
        made = comparison.generator[number] if comparison.generator else None
        seed = comparison.seed[number] if comparison.seed else None
        return Item(ref, address(ref) or f"{self.where(place)}:{number}", self._told or comparison.prompt, made, seed)

    def where(self, place: int) -> str:
        return self._comparisons.rows.where(int(self._rows[place]))


def open_items(
    source: str | Path,
    *,
    format: str = "auto",
    image_column: str | None = None,
    prompt_column: str | None = None,
    prompt: str | None = None,
    split: str = "train",
) -> Items:
    """Open pictures to score without reading them.

    source: a folder of pictures, what `generate` wrote, a JSON-lines, Parquet or tar file of pictures or of comparisons, an
        address of one of these, or a data set that `datasets` loads.
    format: as in `data.readers.open_comparisons`.
    image_column, prompt_column: names of columns, where they are not the usual ones.
    prompt: what all pictures were made for, instead of what the source says.

    Raises DataError for a source that cannot be opened, holds no picture, or has no column of pictures.
    """
    path = at(source)
    if format == "auto" and isinstance(path, Path) and path.is_dir() and _is_bare(path):
        return FolderItems(path, prompt)
    rows = open_rows(source, format=format, split=split)
    if not len(rows):
        raise DataError(f"{str(source)!r} holds no rows; give a source with at least one picture.")
    for column in (image_column, prompt_column):
        if column is not None and column not in rows.columns:
            raise DataError(f"{str(source)!r} has no column {column!r}; {allowed(column, rows.columns)}.")
    found = image_column or _picture_column(rows)
    if found is None:
        columns = {} if prompt_column is None else {"prompt": prompt_column}
        try:
            detect(rows.columns, columns, str(source))
        except DataError as error:
            raise DataError(
                f"{str(source)!r} has the columns {', '.join(rows.columns)}, of which none is a picture and which are no "
                "comparisons either; name the column with --image-column."
            ) from error
        return ComparisonItems(open_comparisons(source, format=format, split=split, columns=columns), prompt)
    told = prompt_column or next((name for name in (*PROMPTS, "text", "txt") if name in rows.columns), None)
    return RowItems(rows, found, told, prompt)


def _picture_column(rows: Rows) -> str | None:
    """The usual column of pictures; None where there is none or where it holds lists, which are comparisons."""
    if any(name.startswith(RAW) for name in rows.columns):  # a score table, whose `image` is a hash
        return "path"
    for name in IMAGE_COLUMNS:
        if name in rows.columns:
            for place in range(min(len(rows), 16)):
                try:
                    value = rows.row(place).get(name)
                except DataError:
                    continue
                if value is not None:
                    return None if isinstance(value, Sequence) and not isinstance(value, str | bytes) else name
            return name
    return None


def _is_bare(folder: Place) -> bool:
    """Whether a folder holds pictures and no table, archive or data set; tables of scores do not count."""
    tables = ("metadata.jsonl", "state.json", "dataset_dict.json")
    if any((folder / name).exists() for name in tables):
        return False
    if next(folder.rglob("*.tar"), None):
        return False
    return all(is_score_table(path) for path in folder.rglob("*.parquet") if isinstance(path, Path))


def _beside(path: Path) -> str | None:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.with_suffix('.txt')} cannot be read as UTF-8 text ({error}); repair or remove it") from None


def _seed(value: Any) -> int | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, Mapping | bool):
        raise DataError(f"seed is {value!r}; it must be a whole number")
    try:
        seed = int(value)
        if seed != float(value) or not -(2**63) <= seed < 2**63:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"seed is {value!r}; it must be a whole number") from None
    return seed
