"""A score table -> rows of a comparison file, by any of the pickers of `select`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowalign.data.writer import can_be_named
from flowalign.errors import DataError, allowed
from flowalign.scoring.select import PICKERS, Pool
from flowalign.scoring.table import ScoreTable


def pools(table: ScoreTable) -> list[Pool]:
    """The pictures of each prompt that every reward scored. Raises DataError for a table that was not calibrated."""
    calibrated, combined, found = table.calibrated(), table.numbers("combined"), []
    for prompt, rows in table.groups().items():
        whole = rows[~(np.isnan(calibrated[rows]).any(1) | np.isnan(combined[rows]))]
        if len(whole) > 1:
            found.append(Pool(prompt, whole, calibrated[whole], combined[whole]))
    return found


def select(
    table: ScoreTable, by: str, settings: Mapping[str, Any] | None = None, *, most: int | None = None, ties: str = "drop"
) -> list[dict[str, Any]]:
    """Pairs of each prompt's pictures as rows of a comparison file, the better one first.

    by: one of `select.PICKERS`; settings: its keywords. most: pairs a prompt. ties: pairs whose `combined` scores are equal are
    dropped or, with "keep", have the preference ½. Rows have the calibrated scores, `combined` among them, and the gap of the
    latter as their margin. Raises DataError for what is not known and for pictures that a file cannot name.
    """
    if by not in PICKERS:
        raise DataError(f"pairs are selected by {by!r}; {allowed(by, PICKERS)}.")
    picker, settings = PICKERS[by], dict(settings or {})
    known = [name for name, each in inspect.signature(picker).parameters.items() if each.kind is each.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise DataError(f"selecting by {by} has no setting {name!r}; {allowed(name, known) if known else 'it has none'}.")
    paths, generators, seeds = (table.data.column(name).to_pylist() for name in ("path", "generator", "seed"))
    rows = []
    for pool in pools(table):
        for a, b in picker(pool, **settings)[:most]:
            gap = float(pool.combined[a] - pool.combined[b])
            if gap == 0 and ties == "drop":
                continue
            places = [int(pool.rows[a]), int(pool.rows[b])]
            unnamed = [paths[place] for place in places if not can_be_named(paths[place])]
            if unnamed:
                raise DataError(
                    f"the picture {unnamed[0]} lies in an archive, where a comparison file cannot name it; score a folder of "
                    "files or a Parquet file."
                )
            scores = {name: pool.calibrated[[a, b], column].tolist() for column, name in enumerate(table.rewards)}
            row: dict[str, Any] = {
                "prompt": pool.prompt,
                "images": [paths[place] for place in places],
                "num_chosen": 1,
                "scores": scores | {"combined": pool.combined[[a, b]].tolist()},
                "margin": gap,
            }
            if gap == 0:
                row["preference"] = 0.5
            for name, values in (("generator", generators), ("seed", seeds)):
                if None not in (found := [values[place] for place in places]):
                    row[name] = found
            rows.append(row)
    return rows
