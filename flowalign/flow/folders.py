"""Folders of pictures, with a `metadata.jsonl` that says what they show or without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flowalign.data.images import decode
from flowalign.data.rows import PICTURES
from flowalign.errors import DataError
from flowalign.files import text_lines

TABLE = "metadata.jsonl"
ENDINGS = tuple(f".{kind}" for kind in sorted(PICTURES))


@dataclass(frozen=True)
class Listed:
    """A picture of a folder."""

    path: Path
    row: Mapping[str, Any]
    """What the table says of it, `file_name` at least."""

    @property
    def file_name(self) -> str:
        return str(self.row["file_name"])

    @property
    def prompt(self) -> str | None:
        """What it shows; None where the table does not say."""
        prompt = self.row.get("prompt", self.row.get("text"))
        return prompt if isinstance(prompt, str) and prompt.strip() else None

    def read(self) -> Image.Image:
        """Upright RGB. Raises DataError."""
        try:
            return decode(self.path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read picture {self.path} ({error.strerror}); make it again or remove its line.") from error
        except DataError as error:
            raise DataError(f"{self.path}: {error}.") from None


def list_pictures(folder: str | Path) -> list[Listed]:
    """The pictures that the folder's table lists, in its order, or all of it by name where it has none.

    Raises DataError for a folder without pictures, a table that cannot be read, and a picture outside of the folder or missing.
    """
    folder = Path(folder)
    table = folder / TABLE
    if not table.is_file():
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in ENDINGS)
        if not files:
            raise DataError(f"{folder} holds no {TABLE} and no pictures ({', '.join(ENDINGS)}); give a folder of pictures.")
        return [Listed(path, {"file_name": path.name}) for path in files]
    out = []
    try:
        lines = text_lines(table)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read ({error}); write it anew in UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
            path = folder / str(row["file_name"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{table} line {number} is no JSON object with a file_name; write one picture a line.") from error
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise DataError(f"{table} line {number} names {row['file_name']!r}, which is not in its folder; remove the line.")
        out.append(Listed(path, row))
    if not out:
        raise DataError(f"{table} lists no picture; make at least one.")
    return out
