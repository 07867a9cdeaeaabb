"""`ScoreTable`: pictures, prompts and one column per reward, as Arrow in memory and Parquet on disk.

    image        string   sha256 of the encoded picture: its identity
    path         string   where its bytes lie: a path, `table.parquet#12`, or an address
    prompt       string
    generator    string   what made it, or null
    seed         int64    with which seed, or null
    raw.R        double   score by reward R, in R's own unit and direction; null where R gave none
    why.R        string   why raw.R is null; null where it is not
    calibrated.R double   after calibration, higher is better; comparable between rewards
    combined     double   one number for all rewards, higher is better
    disagreement double   how far the rewards are apart on this picture

What stands after `path` is optional but `prompt`. The file's metadata (key `flowalign`) holds a version and, for every reward,
its card: range, direction, licence, weights, fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flowalign.errors import DataError, allowed, reason
from flowalign.files import atomic
from flowalign.scoring.rewards.base import Card

VERSION = 1
KEY = b"flowalign"
RAW, WHY, CALIBRATED = "raw.", "why.", "calibrated."
IDENTITY = {
    "image": pa.string(),
    "path": pa.string(),
    "prompt": pa.string(),
    "generator": pa.string(),
    "seed": pa.int64(),
}


@dataclass(frozen=True)
class ScoreTable:
    """An immutable table of scored pictures; one row per picture and prompt."""

    data: pa.Table
    cards: Mapping[str, Card]
    """Reward name -> its card, in the order of the columns."""

    def __len__(self) -> int:
        return self.data.num_rows

    @property
    def rewards(self) -> tuple[str, ...]:
        return tuple(self.cards)

    def texts(self, column: str) -> list[str | None]:
        """A text column, such as "prompt"."""
        return self.data.column(column).to_pylist()

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A number column `[n]`; NaN where there is none."""
        if column not in self.data.column_names:
            raise DataError(f"the table has no column {column!r}; {allowed(column, self.data.column_names)}.")
        return self.data.column(column).to_numpy(zero_copy_only=False).astype(np.float64)

    def raw(self, reward: str) -> NDArray[np.float64]:
        """Raw scores `[n]`, in the reward's own direction; NaN where there is none."""
        return self.numbers(RAW + reward)

    def oriented(self, reward: str) -> NDArray[np.float64]:
        """Raw scores `[n]`, negated where lower is better; NaN where there is none."""
        return self.cards[reward].sign * self.raw(reward)

    def calibrated(self) -> NDArray[np.float64]:
        """Calibrated scores `[n, rewards]`. Raises DataError for a table that was not calibrated."""
        missing = [name for name in self.rewards if CALIBRATED + name not in self.data.column_names]
        if missing:
            raise DataError(
                f"the table holds no calibrated scores of {', '.join(missing)}; run flowalign calibrate on it first."
            )
        return np.stack([self.numbers(CALIBRATED + name) for name in self.rewards], axis=1)

    def groups(self) -> dict[str, NDArray[np.int64]]:
        """Prompt -> its rows, in order of first appearance."""
        places: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.texts("prompt")):
            places.setdefault(str(prompt), []).append(row)
        return {prompt: np.array(rows) for prompt, rows in places.items()}

    def having(self, columns: Mapping[str, Sequence[Any] | NDArray[Any] | pa.Array]) -> ScoreTable:
        """The same with these columns added or replaced. NaN becomes null."""
        data = self.data
        for name, values in columns.items():
            array = values if isinstance(values, pa.Array) else pa.array(values, from_pandas=True)
            place = data.column_names.index(name) if name in data.column_names else None
            data = data.append_column(name, array) if place is None else data.set_column(place, name, array)
        return ScoreTable(data, self.cards)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> ScoreTable:
        """These rows, in this order."""
        return ScoreTable(self.data.take(pa.array(np.asarray(rows, dtype=np.int64))), self.cards)

    def write(self, path: Path) -> None:
        """Write Parquet, atomically."""
        with atomic(path) as temporary:
            pq.write_table(self.data.replace_schema_metadata(metadata(self.cards)), temporary, compression="zstd")


def is_score_table(path: Path) -> bool:
    """Whether a Parquet file holds a table of scores, of which only the schema is read."""
    try:
        return KEY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def raw_scores(path: Path, reward: str) -> NDArray[np.float64]:
    """Raw scores `[n]` by one reward of the table in a file, of which nothing else is read; NaN where there is none."""
    column = pq.read_table(path, columns=[RAW + reward]).column(0)
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def metadata(cards: Mapping[str, Card]) -> dict[bytes, bytes]:
    """What a table's file says of its rewards."""
    about = {"version": VERSION, "rewards": [asdict(card) for card in cards.values()]}
    return {KEY: json.dumps(about).encode()}


def is_table(path: Path) -> bool:
    """Whether a file says of itself that it is a score table."""
    try:
        return path.suffix == ".parquet" and KEY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def read_table(path: Path) -> ScoreTable:
    """Read a table that `ScoreTable.write` wrote. Raises DataError for anything else."""
    try:
        data = pq.read_table(path)
        about = json.loads((data.schema.metadata or {})[KEY])
        if about["version"] != VERSION:
            raise DataError(f"{path} is a score table of version {about['version']}; this flowalign reads version {VERSION}.")
        cards = {card["name"]: Card(**card | {"range": tuple(card["range"])}) for card in about["rewards"]}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give the Parquet file that flowalign score wrote.") from error
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a score table ({reason(error)}); give the Parquet file that flowalign score wrote."
        ) from error
    missing = [name for name in ("image", "path", "prompt", *(RAW + name for name in cards)) if name not in data.column_names]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; score the pictures again.")
    return ScoreTable(data, cards)
