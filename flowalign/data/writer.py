"""Comparisons -> a file that `open_comparisons` reads again: JSON lines in flowalign's own columns."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowalign.data.columns import CELL, FREE, conventions
from flowalign.data.readers import Comparisons
from flowalign.data.records import CellImage, Comparison, FileImage, ImageRef
from flowalign.data.remote import ADDRESS, at, whole
from flowalign.data.tables import ParquetRows
from flowalign.errors import ConfigError, DataError
from flowalign.files import write_text


def address(image: ImageRef) -> str | None:
    """Where a picture lies, from the root, so that a comparison can name it; None for what only its own row can find."""
    if isinstance(image, FileImage):
        return str(whole(image.path))
    if isinstance(image, CellImage) and isinstance(image.table, ParquetRows):
        return image.table.address(image.row, image.column)
    return None


def can_be_named(path: str) -> bool:
    """Whether a comparison file can name what lies at this `address`."""
    return bool(CELL.fullmatch(path) or ADDRESS.match(path)) or Path(path).is_absolute()


def row_of(comparison: Comparison) -> dict[str, Any]:
    """A comparison in flowalign's columns; pictures by their `address`. Raises DataError for a picture that has none."""
    row: dict[str, Any] = {"prompt": comparison.prompt}
    for name in ("images", "noise", "mask"):
        refs = getattr(comparison, name)
        if refs is not None:
            places = [address(ref) for ref in refs]
            if None in places:
                raise DataError(
                    f"{comparison.source or comparison.prompt!r} holds its pictures in itself, where another file cannot name "
                    "them; write them as files, or as cells of a Parquet file, first."
                )
            row[name] = places
    row["num_chosen"] = comparison.num_chosen
    if comparison.scores:
        row["scores"] = {name: list(values) for name, values in comparison.scores.items()}
    for name, usual in (("preference", 1.0), ("weight", 1.0)):
        if getattr(comparison, name) != usual:
            row[name] = getattr(comparison, name)
    for name in ("margin", "grades", "generator", "seed", "objective_weights", "annotator"):
        value = getattr(comparison, name)
        if value is not None:
            row[name] = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    return row


def others_of(comparisons: Comparisons, place: int) -> dict[str, Any]:
    """What a comparison's row holds beside the columns that conventions know, as far as JSON can hold it."""
    if comparisons.convention.index is not None:  # several rows are one comparison
        return {}
    known = {name for convention in conventions() for name in convention.columns} | FREE
    row = comparisons.rows.row(comparisons.number(place))
    return {name: value for name, value in row.items() if name not in known and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def check_not_source(out: Path, *sources: str | Path | None, flag: str = "--out") -> None:
    """Raises ConfigError where `out` is a file that is read: rows that are left out of the new one would be lost.

    sources: all that is read; None is not given. flag: of the command line that `out` comes from.
    """
    read = [Path(source).expanduser() for source in sources if source is not None]
    if out.exists() and any(here.exists() and out.samefile(here) for here in read):
        other = out.with_name(f"{out.stem}-new{out.suffix}")
        raise ConfigError(
            f"{flag} is {out}, which is what is read and would be lost; give another file, such as {flag} {other}."
        )


def write_comparisons(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows whose pictures are named from the root; how many there were.

    Pictures below the file's folder or beside it are named relative to it, so that the two can be moved together.
    """
    folder, lines = os.path.realpath(path.parent), []
    for row in rows:
        named = {name: [_near(place, folder) for place in row[name]] for name in ("images", "noise", "mask") if name in row}
        lines.append(json.dumps({**row, **named}, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(path, "".join(lines))
    return len(lines)


def _near(place: str, folder: str) -> str:
    if not isinstance(at(place), Path):
        return place
    file, mark, cell = place.partition("#") if re.fullmatch(CELL, place) else (place, "", "")
    relative = os.path.relpath(file, folder)
    return place if relative.startswith(f"..{os.sep}..") else relative + mark + cell
