"""Column conventions: which columns of a source are the prompt, the pictures and the vote. One function a convention."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowalign.data.records import CellImage, FileImage, ImageRef, InlineImage
from flowalign.data.remote import Place, beside
from flowalign.data.rows import Rows
from flowalign.data.tables import ParquetRows
from flowalign.errors import DataError, allowed

CELL = re.compile(r"(?P<file>.+\.parquet)#(?P<row>\d+)(?::(?P<column>.+))?")
PROMPTS = ("prompt", "caption")
ANNOTATOR = "annotator"
OPTIONAL = (
    "weight",
    "margin",
    "preference",
    "num_chosen",
    "scores",
    "grades",
    "generator",
    "seed",
    "noise",
    "mask",
    "objective_weights",
)
TWO_SIDES = {
    "chosen_rejected": ("chosen", "rejected"),
    "longcat": ("img_path_win", "img_path_lose"),
    "win_lose": ("img_win", "img_lose"),
}
SIDED = ("seed", "noise", "mask")
"""Optional columns that conventions with two sides also take for each side, as in `chosen_seed` and `rejected_seed`."""
FREE = {*PROMPTS, *OPTIONAL, ANNOTATOR, *(f"{side}_{name}" for sides in TWO_SIDES.values() for side in sides for name in SIDED)}
"""Columns that say nothing about the convention."""


class Pictures:
    """Turns what a cell holds into an ImageRef; remembers the Parquet files that references point into."""

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self._files: dict[Place, ParquetRows] = {}

    def ref(self, value: Any, name: str) -> ImageRef:
        """`value`: ImageRef, bytes, `{bytes, path}`, an address, a path from the folder, or `FILE.parquet#ROW[:COLUMN]`."""
        if isinstance(value, ImageRef):
            return value
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return InlineImage(name, value)
        if not isinstance(value, str) or not value:
            raise DataError(f"a picture is {value!r}; it must be a path, picture bytes or FILE.parquet#ROW")
        if match := CELL.fullmatch(value):
            path = beside(self.folder, match["file"])
            if path not in self._files:
                self._files[path] = ParquetRows([path])
            column = match["column"] or "image"
            return CellImage(value, table=self._files[path], row=int(match["row"]), column=column, beside=True)
        return FileImage(value, beside(self.folder, value))


@dataclass(frozen=True)
class Row:
    """One row of a source, seen by a convention."""

    values: Mapping[str, Any]
    number: int
    pictures: Pictures

    @property
    def prompt(self) -> str:
        value = next((self.values[name] for name in PROMPTS if self.values.get(name) is not None), None)
        if value is None:
            raise DataError("the prompt is missing; give every row one")
        return str(value) if isinstance(value, str) else ""  # a Comparison does not take an empty prompt

    @property
    def annotator(self) -> str | None:
        value = self.values.get(ANNOTATOR)
        return str(value) if value not in (None, "") else None

    def get(self, column: str) -> Any:
        if self.values.get(column) is None:
            raise DataError(f"column {column!r} is missing or null; fill it in or remove the row")
        return self.values[column]

    def number_in(self, column: str) -> float:
        return number(self.get(column), column)

    def numbers_in(self, column: str) -> list[float]:
        values = self.get(column)
        if not isinstance(values, list | tuple):
            raise DataError(f"{column} is {values!r}; it must be a list of numbers")
        return [number(value, column) for value in values]

    def images(self, column: str) -> tuple[ImageRef, ...]:
        """One picture or a list of them."""
        value = self.get(column)
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(self.pictures.ref(each, f"{self.number}:{column}{place or ''}") for place, each in enumerate(values))

    def texts(self, *columns: str) -> tuple[str, ...] | None:
        values = [self.values.get(column) for column in columns]
        return None if None in values else tuple(map(str, values))


@dataclass(frozen=True)
class Convention:
    """`columns` must all be there, and a prompt; `build` turns a row (or two) into fields of a Comparison."""

    name: str
    columns: tuple[str, ...]
    build: Callable[..., dict[str, Any]]
    index: Callable[[Rows], np.ndarray] | None = None
    """Rows of each comparison `[M, 2]`, for sources with one picture a row; None where a row is a comparison."""


def number(value: Any, column: str) -> float:
    """A finite number, also when written as text. Raises DataError."""
    try:
        out = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        out = math.nan
    if not math.isfinite(out):
        raise DataError(f"{column} is {value!r}; it must be a finite number")
    return out


def pick_a_pic(row: Row) -> dict[str, Any]:
    """Two pictures and labels that sum to 1: (1, 0), (0, 1), or (0.5, 0.5) for a tie, which stays a tie."""
    if row.values.get("has_label") is False:
        raise DataError("the row has no label (has_label is false); remove it")
    labels = row.number_in("label_0"), row.number_in("label_1")
    if min(labels) < 0 or abs(sum(labels) - 1) > 1e-6:
        raise DataError(f"labels are {labels[0]:g} and {labels[1]:g}; allowed: 1 and 0, 0 and 1, 0.5 and 0.5")
    images = []
    for slot in "01":
        image = row.images(f"jpg_{slot}")[0]
        uid = row.values.get(f"image_{slot}_uid")  # the same picture is voted on in many rows
        images.append(dataclasses.replace(image, name=uid) if uid else image)
    generator = row.texts("model_0", "model_1")
    if labels[1] > labels[0]:
        images, generator = images[::-1], generator and generator[::-1]
    return {"images": tuple(images), "preference": max(labels), "generator": generator}


def hpd_v3(row: Row) -> dict[str, Any]:
    """`path1` preferred over `path2`; `choice_dist` holds the votes for each, `confidence` stands in where there are none."""
    preference = 1.0
    if row.values.get("choice_dist") is not None:
        votes = row.numbers_in("choice_dist")
        if len(votes) != 2 or min(votes) < 0 or sum(votes) == 0:
            raise DataError(f"choice_dist is {votes}; it must hold the votes for path1 and for path2")
        preference = votes[0] / sum(votes)
    elif row.values.get("confidence") is not None:
        preference = row.number_in("confidence")
    return {
        "images": row.images("path1") + row.images("path2"),
        "preference": preference,
        "generator": row.texts("model1", "model2"),
    }


def hpd_v2(row: Row) -> dict[str, Any]:
    """`human_preference`: 1 for preferred pictures and 0 for the others, or equal entries above 0 for two tied pictures."""
    images, votes = row.images("file_path"), row.numbers_in("human_preference")
    if len(votes) != len(images):
        raise DataError(f"human_preference has {len(votes)} entries for {len(images)} pictures; give one per picture")
    if votes == [0.5, 0.5]:
        return {"images": images, "preference": 0.5}
    chosen = [image for image, vote in zip(images, votes, strict=True) if vote == 1]
    rejected = [image for image, vote in zip(images, votes, strict=True) if vote == 0]
    if not chosen or not rejected or len(chosen) + len(rejected) < len(images):
        raise DataError(f"human_preference is {votes}; allowed: 1 and 0 with at least one of each, or [0.5, 0.5]")
    return {"images": tuple(chosen + rejected), "num_chosen": len(chosen)}


def hpd_v2_ranked(row: Row) -> dict[str, Any]:
    """`rank` of each picture, lowest is best: one ranked list."""
    images, ranks = row.images("image_path"), row.numbers_in("rank")
    if len(ranks) != len(images) or len(set(ranks)) < 2:
        raise DataError(f"rank is {ranks} for {len(images)} pictures; give one per picture, not all equal")
    order = sorted(range(len(images)), key=lambda place: ranks[place])
    return {"images": tuple(images[i] for i in order), "grades": tuple(max(ranks) - ranks[i] for i in order)}


def image_reward(better: Row, worse: Row) -> dict[str, Any]:
    """Two rows with the same prompt_id, the lower `rank` first."""
    if better.number_in("rank") >= worse.number_in("rank"):
        raise DataError("rank cannot order the row")
    return {"images": better.images("image") + worse.images("image")}


def image_reward_index(rows: Rows) -> np.ndarray:
    """All pairs of rows with one prompt_id and different ranks, better first; a row without a rank is paired with itself."""
    groups: dict[Any, list[tuple[float, int]]] = {}
    pairs: list[tuple[int, int]] = []
    for place in range(len(rows)):
        try:
            values = rows.row(place)
            groups.setdefault(values["prompt_id"], []).append((number(values.get("rank"), "rank"), place))
        except (DataError, KeyError, TypeError):
            pairs.append((place, place))  # building it raises, so the row is reported and not lost
    for members in groups.values():
        pairs += [(i, j) for a, i in members for b, j in members if a < b]
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def two_columns(chosen: str, rejected: str) -> Callable[[Row], dict[str, Any]]:
    """A column of chosen pictures and one of rejected ones, each one picture or a list, and flowalign's optional columns.

    Those of SIDED may be given for each side.
    """

    def build(row: Row) -> dict[str, Any]:
        images, joined = row.images(chosen), {}
        for name in SIDED:
            columns = f"{chosen}_{name}", f"{rejected}_{name}"
            if any(row.values.get(column) is not None for column in columns):
                values = [row.get(column) for column in columns]
                joined[name] = [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]
        row = dataclasses.replace(row, values={**row.values, **joined})
        return {"num_chosen": len(images)} | optional(row, {"images": images + row.images(rejected)})

    return build


def unpaired(row: Row) -> dict[str, Any]:
    """One picture, and whether it is wanted: `label` 1, 0, true, false, or a probability."""
    label = row.get("label")
    wanted = float(label) if isinstance(label, bool) else number(label, "label")
    return optional(row, {"images": row.images("image")[:1], "preference": wanted})


def native(row: Row) -> dict[str, Any]:
    """`images`, best first, and the optional columns."""
    return optional(row, {"images": row.images("images")})


def optional(row: Row, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with those of the OPTIONAL columns that the row has."""
    count = len(fields["images"])
    for name in OPTIONAL:
        value = row.values.get(name)
        if value is None:
            continue
        try:
            if name in ("weight", "margin", "preference"):
                value = number(value, name)
            elif name == "num_chosen":
                value = int(number(value, name))
            elif name == "scores":
                value = {
                    reward: tuple(number(v, name) for v in values) for reward, values in value.items() if values is not None
                }
            elif name == "objective_weights":
                value = {objective: number(v, name) for objective, v in value.items() if v is not None}
            elif name == "grades":
                value = tuple(number(v, name) for v in value)
            elif name in ("noise", "mask"):
                value = row.images(name) * (1 if isinstance(value, list | tuple) else count)
            elif name == "generator":
                value = (value,) * count if isinstance(value, str) else tuple(map(str, value))
            else:
                value = (value,) * count if isinstance(value, int) else tuple(map(int, value))
        except (TypeError, ValueError, AttributeError):
            raise DataError(
                f"{name} is {value!r}, which does not fit; see the column's form in the data documentation"
            ) from None
        fields[name] = value
    return fields


def conventions() -> tuple[Convention, ...]:
    """The known conventions, in the order in which they are tried."""
    return (
        Convention("pick_a_pic", ("jpg_0", "jpg_1", "label_0", "label_1"), pick_a_pic),
        Convention("hpd_v3", ("path1", "path2"), hpd_v3),
        Convention("hpd_v2", ("file_path", "human_preference"), hpd_v2),
        Convention("hpd_v2_ranked", ("image_path", "rank"), hpd_v2_ranked),
        Convention("image_reward", ("image", "prompt_id", "rank"), image_reward, image_reward_index),
        *(Convention(name, sides, two_columns(*sides)) for name, sides in TWO_SIDES.items()),
        Convention("unpaired", ("image", "label"), unpaired),
        Convention("native", ("images",), native),
    )


def detect(found: Iterable[str], overrides: Mapping[str, str], source: str) -> Convention:
    """The convention of a source with columns `found`, some renamed by `overrides` (known name -> name in the source).

    Raises DataError naming the columns and the conventions.
    """
    found = tuple(found)
    known = {name for convention in conventions() for name in convention.columns} | FREE
    for name, column in overrides.items():
        if name not in known:
            raise DataError(f"columns names {name!r}, which no convention has; {allowed(name, known)}")
        if column not in found:
            raise DataError(f"{source} has no column {column!r} to use as {name!r}; {allowed(column, found)}")
    present = {*found, *overrides}
    wanted = {*overrides} - FREE  # an override says which convention is meant
    for convention in conventions():
        if wanted <= {*convention.columns} <= present and present & {*PROMPTS}:
            return convention
    forms = "; ".join(f"{convention.name} ({', '.join(convention.columns)})" for convention in conventions())
    raise DataError(
        f"{source} has columns {', '.join(found) or '(none)'}, which fit no known convention; each needs prompt or caption, "
        f"and one of {forms}; name yours with columns, for example prompt=..., chosen=..., rejected=..."
    )
