"""Comparisons for a flow from a score table: the best and the worst of n, written as a file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.data.writer import write_comparisons
from flowalign.errors import ConfigError, DataError
from flowalign.flow.settings import Scores
from flowalign.rng import Keyed
from flowalign.scoring.table import ScoreTable, read_table


def write_pairs(scores: Scores, path: Path, seed: int) -> int:
    """Comparisons of the best with the worst of each n pictures of a prompt, as JSON lines; returns how many.

    Kim et al. 2024, section 5: of n samples the preferred and the rejected one. Pictures of a prompt are dealt into parts of n
    in an order drawn from the seed; a part of one, or whose best is no better than its worst, gives nothing, nor does a picture
    without a score. Raises DataError where nothing is left, and as `read_table` does.
    """
    table = read_table(Path(scores.table))
    values = _values(table, scores)
    paths, generators = table.texts("path"), _column(table, "generator")
    seeds = _column(table, "seed")
    found: list[dict[str, Any]] = []
    for prompt, rows in table.groups().items():
        rows = rows[np.isfinite(values[rows])]
        order = rows[Keyed(seed).permutation(f"best-of-n {prompt}", 0, len(rows)).numpy()]
        size = scores.n or max(2, len(order))
        for start, end in pairwise([*range(0, len(order), size), len(order)]):
            part = order[start:end]
            best, worst = int(part[values[part].argmax()]), int(part[values[part].argmin()])
            if not values[best] > values[worst]:
                continue
            row: dict[str, Any] = {
                "prompt": prompt,
                "images": [str(paths[best]), str(paths[worst])],
                "num_chosen": 1,
                "scores": {scores.reward or "combined": [float(values[best]), float(values[worst])]},
                "margin": float(values[best] - values[worst]),
            }
            if generators[best] is not None and generators[worst] is not None:
                row["generator"] = [generators[best], generators[worst]]
            if seeds[best] is not None and seeds[worst] is not None:
                row["seed"] = [seeds[best], seeds[worst]]
            found.append(row)
    if not found:
        raise DataError(f"{scores.table} holds no prompt with two pictures of different scores; draw more pictures a prompt.")
    return write_comparisons(path, found)


def _values(table: ScoreTable, scores: Scores) -> NDArray[np.float64]:
    """Scores `[n]`, higher is better; NaN where there is none."""
    if scores.reward is not None:
        if scores.reward not in table.cards:
            raise ConfigError(f"scores.reward {scores.reward!r} is not in {scores.table}; allowed: {', '.join(table.rewards)}.")
        return table.oriented(scores.reward)
    if "combined" in table.data.column_names:
        return table.numbers("combined")
    if len(table.rewards) == 1:
        return table.oriented(table.rewards[0])
    raise ConfigError(
        f"{scores.table} holds several rewards and no combined score; set scores.reward to one of {', '.join(table.rewards)}."
    )


def _column(table: ScoreTable, name: str) -> list[Any]:
    return table.texts(name) if name in table.data.column_names else [None] * len(table)
