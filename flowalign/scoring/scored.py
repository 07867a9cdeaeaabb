"""Scored rows on their way into a table: what is known of each, how they are written and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flowalign.errors import FlowalignError, reason
from flowalign.files import atomic
from flowalign.scoring.rewards.base import Card
from flowalign.scoring.sources import Item
from flowalign.scoring.table import IDENTITY, RAW, WHY, metadata

COUNTED = ("forwards", "cached")
PROBLEMS = 20
"""Rows without a score of which the reason is told at the end."""


@dataclass
class Scored:
    """One row on its way into the table."""

    item: Item
    image: str | None
    """sha256 of the encoded picture; None where it could not be read."""
    scores: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    """By the backbone's key: what it takes."""
    forwards: int = 0
    """How often it went through a backbone."""
    cached: int = 0
    """Scores that were known."""

    @property
    def name(self) -> tuple[str, str]:
        """What the cache knows the row by."""
        return self.image or "", self.item.prompt or ""

    def lacks(self, reward: str) -> bool:
        """Whether there is neither a score nor a reason why there is none."""
        return reward not in self.scores and reward not in self.why


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows."""

    rows: int
    scored: int
    """Rows with at least one score."""
    failed: int
    """Rows that lack at least one score."""
    forwards: int
    """Pictures that went through a backbone, each backbone counted."""
    cached: int
    """Scores that were known."""
    problems: tuple[str, ...]
    """Of the first rows that lack one, where and why."""


def schema_of(cards: Mapping[str, Card]) -> pa.Schema:
    """The columns of a table before it is calibrated."""
    raw, why = ([(prefix + name, kind) for name in cards] for prefix, kind in ((RAW, pa.float64()), (WHY, pa.string())))
    return pa.schema([*IDENTITY.items(), *raw, *why], metadata=metadata(cards))


def cells(rows: Sequence[Scored], cards: Mapping[str, Card]) -> pa.Table:
    """Rows as a table of `schema_of`, and beside it how many forwards and known scores each took, in `COUNTED`."""
    schema = schema_of(cards)
    for name in COUNTED:
        schema = schema.append(pa.field(name, pa.int64()))
    return pa.Table.from_pylist([_cell(row, cards) for row in rows], schema=schema)


def write_blocks(blocks: Iterable[pa.Table], cards: Mapping[str, Card], out: Path) -> Counts:
    """Write what `cells` gave, one after the other, and count."""
    sums = dict.fromkeys(("rows", "scored", "failed", *COUNTED), 0)
    problems: list[str] = []
    with atomic(out) as temporary, pq.ParquetWriter(temporary, schema_of(cards), compression="zstd") as writer:
        for block in blocks:
            writer.write_table(block.drop_columns(list(COUNTED)))
            reasons = [block.column(WHY + name).to_pylist() for name in cards]
            scores = np.stack([block.column(RAW + name).is_valid().to_numpy() for name in cards])
            failed = [place for place, whys in enumerate(zip(*reasons, strict=True)) if any(whys)]
            sums["rows"] += block.num_rows
            sums["scored"] += int(scores.any(0).sum())
            sums["failed"] += len(failed)
            for name in COUNTED:
                sums[name] += sum(block.column(name).to_pylist())
            for place in failed[: PROBLEMS - len(problems)]:
                said = {why[place]: name for why, name in zip(reasons, cards, strict=True) if why[place]}
                why, name = next(iter(said.items()))
                everywhere = len(said) == 1 and all(each[place] for each in reasons)
                problems.append(f"{block.column('path')[place].as_py()}: {'' if everywhere else name + ': '}{why}")
    return Counts(problems=tuple(problems), **sums)


def said_by(error: Exception) -> str:
    """What stands in the table of an error."""
    return str(error) if isinstance(error, FlowalignError) else f"{type(error).__name__}: {reason(error)}"


def unreadable(prompt: str | None) -> str | None:
    """Why a prompt cannot be read; None where it can."""
    if prompt is None:
        return "the picture has no prompt; give one beside it, in a column, or for all with --prompt"
    if not prompt.strip():
        return "the prompt is blank"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return f"the prompt {prompt!r} is not Unicode text: it holds half of a character"
    return None


def _cell(row: Scored, cards: Mapping[str, Card]) -> dict[str, Any]:
    item = row.item
    found: dict[str, Any] = {"image": row.image, "path": _text(item.path), "prompt": _text(item.prompt)}
    found |= {"generator": _text(item.generator), "seed": item.seed}
    for name in cards:
        found[RAW + name], found[WHY + name] = row.scores.get(name), _text(row.why.get(name))
    return found | {"forwards": row.forwards, "cached": row.cached}


def _text(value: str | None) -> str | None:
    """With what is not Unicode, such as bytes of a file's name, as question marks: a table holds text."""
    return None if value is None else value.encode("utf-8", "replace").decode()
