"""A score table -> rows of a comparison file, by any of the pickers of `select`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.data.writer import can_be_named
from flowalign.errors import DataError, allowed
from flowalign.scoring.select import PICKERS, TEMPERATURE, Pool
from flowalign.scoring.table import CALIBRATED, ScoreTable

AMONG = ("frs", "intersection", "majority")
"""Pickers that hold rewards against each other, so that the one score decides nothing about who wins."""
ONE_A_PROMPT = ("best_worst", "random")
"""Pickers that give one pair a prompt unless told otherwise; the others give all that they find."""
LEAST = 0.1
"""Of picker margin, unless told otherwise."""
TIES = ("drop", "keep")
LABELS = ("votes", "rates")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Picked:
    """Two rows of a table."""

    better: int
    worse: int
    gap: float
    """Of the one score."""
    tie: bool
    weights: Mapping[str, float] | None = None
    """Of the rewards, where they made the score."""
    label: float | None = None
    """The probability that the better one is preferred; None is a vote, or a tie."""


def select(
    table: ScoreTable,
    by: str,
    *,
    score: str = "combined",
    most: int | None = None,
    least: float | None = None,
    ties: str = "drop",
    tie_width: float = 0.0,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    labels: str = "votes",
) -> list[dict[str, Any]]:
    """Pairs of each prompt's pictures as rows of a comparison file, the better one first; arguments as in `pick`.

    Rows have the calibrated scores, `combined` among them where that orders, and the gap of the one score as their margin.
    labels: votes, or rates: where scores are rates to win, the label is ½ + (P_w − P_l)/2, half the gap being `sppo`'s target;
    that of a tie stays ½.
    Raises DataError for what is not known and for pictures that a file cannot name.
    """
    if labels not in LABELS:
        raise DataError(f"labels are {labels!r}; {allowed(labels, LABELS)}.")
    how = {"least": least, "ties": ties, "tie_width": tie_width, "seed": seed, "temperature": temperature}
    found = pick(table, by, score=score, most=most, **how)  # type: ignore[arg-type]
    if labels == "rates" and (wide := [each.gap for each in found if abs(each.gap) > 1]):
        raise DataError(f"labels by rates are of scores from 0 to 1, and {score} has a gap of {wide[0]:g}; calibrate first.")
    rows = rows_of(table, found, score)
    if labels == "votes":
        return rows
    return [row if each.tie else row | {"preference": 0.5 + 0.5 * each.gap} for row, each in zip(rows, found, strict=True)]


def prompted(table: ScoreTable) -> ScoreTable:
    """The pictures that have a prompt, which comparisons need. Raises DataError where none has."""
    rows = [row for row, prompt in enumerate(table.texts("prompt")) if prompt and prompt.strip()]
    if not rows:
        raise DataError(
            "no picture of the table has a prompt, and a comparison is of two pictures of one; score them with their prompts, "
            "or with --prompt TEXT for all."
        )
    return table if len(rows) == len(table) else table.select(rows)


def pick(
    table: ScoreTable,
    by: str,
    *,
    score: str = "combined",
    most: int | None = None,
    least: float | None = None,
    ties: str = "drop",
    tie_width: float = 0.0,
    seed: int = 0,
    temperature: float = TEMPERATURE,
) -> list[Picked]:
    """Pairs of rows of one prompt.

    by: one of `select.PICKERS`. score: what orders pictures: the table's combined column, "raw" (the plain sum of raw scores),
    or a reward. most: pairs of a prompt, the most telling first; None is 1 for `ONE_A_PROMPT`. least: smallest gap; None is
    `LEAST` for margin. ties: of pickers that go by the one score, pairs whose gap is at most `tie_width` are dropped or
    kept as ties. seed: of random and rso. temperature: β of rso. Pictures that lack a score take no part. Raises DataError.
    """
    for what, value, choices in (("by", by, tuple(PICKERS)), ("ties", ties, TIES)):
        if value not in choices:
            raise DataError(f"{what} is {value!r}; {allowed(value, choices)}.")
    rewards, one = _scores(table, by, score)
    known = ~np.isnan(rewards).any(1) & ~np.isnan(one)
    most = most or (1 if by in ONE_A_PROMPT else len(table) ** 2)
    floor = least if least is not None else LEAST if by == "margin" else -np.inf
    picked: list[Picked] = []
    for prompt, every in table.groups().items():
        rows, found = every[known[every]], 0
        pool = Pool(prompt, rows, rewards[rows], one[rows], seed, temperature)
        for a, b in PICKERS[by](pool) if len(rows) > 1 else ():
            gap = float(one[rows[a]] - one[rows[b]])
            tie = by not in AMONG and gap <= tie_width
            if ties == "keep" if tie else gap >= floor:
                picked.append(Picked(int(rows[a]), int(rows[b]), gap, tie))
                found += 1
            if found == most:
                break
    return picked


def _is_calibrated(table: ScoreTable) -> bool:
    return all(CALIBRATED + name in table.data.column_names for name in table.rewards)


def _scores(table: ScoreTable, by: str, score: str) -> tuple[Array, Array]:
    """(rewards `[n, K]`, the one score `[n]`)."""
    raw = np.stack([table.oriented(name) for name in table.rewards], axis=1)
    if score == "raw":
        return raw, raw.sum(1)
    if score in table.rewards:
        place = table.rewards.index(score)
        values = table.calibrated() if _is_calibrated(table) else raw
        return values if by in AMONG else values[:, [place]], values[:, place]
    if score != "combined":
        raise DataError(f"score is {score!r}; {allowed(score, ('combined', 'raw', *table.rewards))}.")
    return table.calibrated(), table.numbers("combined")


def rows_of(table: ScoreTable, picked: Sequence[Picked], score: str) -> list[dict[str, Any]]:
    """Rows for `data.writer.write_comparisons`. Raises DataError for a picture that no file can name."""
    column = CALIBRATED if score != "raw" and _is_calibrated(table) else None
    scores = {name: table.numbers(column + name) if column else table.oriented(name) for name in table.rewards}
    scores |= {"combined": table.numbers("combined")} if score == "combined" else {}
    prompts, paths = table.texts("prompt"), table.texts("path")
    made = {name: table.texts(name) for name in ("generator", "seed") if name in table.data.column_names}
    rows = []
    for each in picked:
        places = [each.better, each.worse]
        for place in places:
            if not can_be_named(str(paths[place])):
                raise DataError(
                    f"the picture {paths[place]} lies in an archive or a data set, where a comparison file cannot name it; "
                    "score a folder of files or a Parquet file."
                )
        row: dict[str, Any] = {"prompt": prompts[each.better], "images": [paths[place] for place in places], "num_chosen": 1}
        two = {name: values[places] for name, values in scores.items()}
        row["scores"] = {name: values.tolist() for name, values in two.items() if np.isfinite(values).all()}
        row["margin"] = each.gap
        label = 0.5 if each.tie else each.label
        row |= {"preference": label} if label is not None else {}
        if each.weights is not None:
            row["objective_weights"] = dict(each.weights)
            if score == "combined":  # what is one number for all rewards is so under the pair's own weights
                row["scores"]["combined"] = sum(weight * two[name] for name, weight in each.weights.items()).tolist()
        for name, column_ in made.items():
            if None not in (found := [column_[place] for place in places]):
                row[name] = found
        rows.append(row)
    return rows
