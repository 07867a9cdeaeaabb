"""The verb that turns scores into comparisons to train on, or keeps the comparisons that are worth it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.data.readers import open_comparisons, scan
from flowalign.data.writer import check_not_source, others_of, row_of, write_comparisons
from flowalign.errors import ConfigError, DataError, RunError, allowed, reason
from flowalign.files import check_file, text_lines
from flowalign.scoring.comparisons import AMONG, TIES, prompted, rows_of
from flowalign.scoring.comparisons import select as select_pairs
from flowalign.scoring.order import IMPLICIT, ORDERS, histogram_weights, order
from flowalign.scoring.select import PICKERS
from flowalign.scoring.steered import STEERED, steered
from flowalign.scoring.table import ScoreTable, is_table, read_table

BY = tuple(dict.fromkeys((*PICKERS, STEERED, *ORDERS)))
WEIGHTS = ("even", "histogram")
RATIO = 0.4
"""Share of comparisons that orders keep unless told otherwise: Huang et al. 2025, 2503.01864."""

_PICKED = (*PICKERS, "explicit")
_BY_ONE_SCORE = tuple(name for name in _PICKED if name not in AMONG)
READ_BY: Mapping[str, tuple[str, ...]] = {
    "score": _PICKED,
    "most": _PICKED,
    "least": (*_PICKED, STEERED),
    "ties": _BY_ONE_SCORE,
    "tie_width": _BY_ONE_SCORE,
    "labels": (*_PICKED, STEERED),
    "temperature": ("rso",),
    **dict.fromkeys(("objectives", "alpha", "draws", "plan"), (STEERED,)),
    "potential_weight": ("potential",),
}
"""Of options that not every way reads: the ways that do. Orders of comparisons read none but the last."""


def select(
    source: str | Path,
    *,
    by: str,
    out: Path,
    score: str | None = None,
    most: int | None = None,
    least: float | None = None,
    ties: str | None = None,
    tie_width: float | None = None,
    weights: str = "even",
    ratio: float | None = None,
    potential_weight: float | None = None,
    objectives: Sequence[str] = (),
    alpha: float | None = None,
    draws: int | None = None,
    plan: Path | None = None,
    temperature: float | None = None,
    labels: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write comparisons that `align` reads: pairs of a score table, or the most telling ones of a file of comparisons.

    source: a table, and `by` one of `select.PICKERS`, "explicit" for the widest of best_worst, or "steered", whose rewards and
    weights `objectives`, `alpha` and `draws` set, see `scoring.steered.steered`, or `plan`, a file of what was drawn under
    which weights, as improve writes it; or comparisons, and `by` one of `order.ORDERS`. score, most, least, ties, tie_width:
    see `scoring.comparisons.pick`. weights: "histogram" lets pairs with rare gaps count more. ratio: share of the comparisons
    that is kept, the first by the order; None is 0.4 where `by` is an order, else all. potential_weight: w of the alignment
    potential, 1. temperature: β of rso, 0.5. labels: votes, or rates (`scoring.comparisons.select`), or mixture
    (`scoring.steered.steered`). What is None is as those functions have it. Raises UserError, also for an option that the way
    does not read, but for the seed, and RunError where nothing is left.
    """
    check_file(out)
    check_not_source(out, source, plan)
    table_only = {"score": score, "most": most, "least": least, "ties": ties, "tie_width": tie_width, "labels": labels}
    table_only |= {"objectives": objectives or None, "alpha": alpha, "draws": draws, "plan": plan, "temperature": temperature}
    given = {name: value for name, value in table_only.items() if value is not None}
    of_order = [] if potential_weight is None else ["potential_weight"]
    for what, value, choices in (("by", by, BY), ("ties", ties or TIES[0], TIES), ("weights", weights, WEIGHTS)):
        if value not in choices:
            raise ConfigError(f"{what} is {value!r}; {allowed(value, choices)}.")
    if ratio is not None and not 0 < ratio <= 1:
        raise ConfigError(f"ratio is {ratio}; it is a share, above 0 and at most 1.")
    counts: dict[str, int] = {}
    if is_table(Path(source)):
        if by not in PICKERS and by not in ("explicit", STEERED):
            raise ConfigError(
                f"by is {by!r}, which reads what flowalign margins adds to comparisons, and {source} is a score table; select "
                "best_worst from it, run flowalign margins on that, and select from what it writes."
            )
        whole, picker = read_table(Path(source)), "best_worst" if by == "explicit" else by
        table = prompted(whole)
        counts["without_prompt"] = len(whole) - len(table)
        check_options(by, [*given, *of_order])
        if temperature is not None and temperature <= 0:
            raise ConfigError(f"temperature is {temperature:g}; it must be above 0.")
        if by == STEERED:
            how = {name: value for name, value in given.items() if name not in ("objectives", "plan")}
            under = None if plan is None else _planned(plan, table)
            found = steered(table, objectives, under=under, seed=seed, **how)  # type: ignore[arg-type]
            rows = rows_of(table, found, "combined" if "combined" in table.data.column_names else table.rewards[0])
        else:
            rows = select_pairs(table, picker, seed=seed, **given)  # type: ignore[arg-type]
        if by == "explicit" or ratio is not None:
            gaps = np.array([row["margin"] for row in rows])
            rows = [rows[place] for place in order("explicit", gaps, gaps, [""] * len(rows))[: _count(ratio, len(rows))]]
        of = "pairs"
    else:
        if by not in ORDERS and not Path(source).expanduser().exists():
            raise DataError(f"{source} does not exist; give a score table, the Parquet file that flowalign calibrate wrote.")
        if by not in ORDERS:
            raise ConfigError(
                f"by is {by!r}, which picks pairs from a score table, and {source} is none; give what flowalign calibrate "
                f"wrote, or order comparisons by one of {', '.join(ORDERS)}."
            )
        if given:
            raise ConfigError(
                f"{_named(given)} given, which a score table's pairs are picked with, and {source} holds comparisons; leave "
                "that out, or give it where the pairs are picked."
            )
        check_options(by, of_order)
        rows, counts = _ordered(source, by, ratio, 1.0 if potential_weight is None else potential_weight, seed)
        of = f"of {counts['given']} comparisons"
    if not rows:
        raise RunError(f"{by} selects nothing from {source}; lower the least gap, keep ties, or score more pictures a prompt.")
    if weights == "histogram":
        found = histogram_weights(np.array([row.get("margin") or 0.0 for row in rows])).tolist()
        rows = [row | {"weight": weight} for row, weight in zip(rows, found, strict=True)]
    count, prompts = write_comparisons(out, rows), len({row["prompt"] for row in rows})
    bad = f"; {counts['bad_rows']} rows could not be used" if counts.get("bad_rows") else ""
    bad += f"; {counts['without_prompt']} pictures without a prompt were left out" if counts.get("without_prompt") else ""
    said = f"{count} {of} of {prompts} prompts in {out}{bad}"
    return {"out": str(out), "count": count, "prompts": prompts, **counts, "summary": said}


def check_options(by: str, given: Iterable[str]) -> None:
    """Raises ConfigError for an option that this way does not read."""
    given = tuple(given)
    for name in given:
        if by not in (ways := READ_BY[name]):
            raise ConfigError(f"{name} is given, which {by} does not read, only {', '.join(ways)}; leave it out.")
    if "plan" in given and (drawn := [name for name in ("alpha", "draws") if name in given]):
        raise ConfigError(
            f"{_named(drawn)} given beside a plan, which has the weights that alpha and draws draw; leave one out."
        )


def _named(options: Iterable[str]) -> str:
    names = [*options]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _planned(path: Path, table: ScoreTable) -> list[Mapping[str, float]]:
    """Weights of each row of the table by a plan's. Raises DataError for a row that the plan lacks or has no weights for."""
    try:
        lines = text_lines(path)
        known = {(row["prompt"], row["seed"]): row.get("weights") for row in map(json.loads, lines)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{path} is not a plan of pictures ({reason(error)})"
        raise DataError(f"{said}; name a plan.jsonl of flowalign improve.") from error
    found, seeds = [], table.texts("seed") if "seed" in table.data.column_names else [None] * len(table)
    for prompt, seed in zip(table.texts("prompt"), seeds, strict=True):
        if not known.get((prompt, seed)):
            raise DataError(
                f"{path} has no weights for the picture of {prompt!r} and seed {seed}; take the plan that it was drawn by, or "
                "leave it out to draw weights."
            )
        found.append(known[prompt, seed])
    return found


def _ordered(
    source: str | Path, by: str, ratio: float | None, potential_weight: float, seed: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the comparisons that are kept, the first by the order first, and counts."""
    comparisons = open_comparisons(source)
    good, bad = scan(comparisons)
    rows, explicit, implicit, names = [], [], [], []
    for place in good:
        comparison, extra = comparisons[place], others_of(comparisons, place)
        rows.append(row_of(comparison) | extra)
        explicit.append(np.nan if comparison.margin is None else comparison.margin)
        margin = extra.get(IMPLICIT)
        implicit.append(float(margin) if isinstance(margin, int | float) and not isinstance(margin, bool) else np.nan)
        names.append(f"{comparison.prompt}\x1f{comparison.id}")
    first = order(by, np.array(explicit), np.array(implicit), names, weight=potential_weight, seed=seed)
    kept = [rows[place] for place in first[: _count(ratio, len(rows))]]
    return kept, {"given": len(comparisons), "bad_rows": len(bad)}


def _count(ratio: float | None, count: int) -> int:
    return max(1, round((RATIO if ratio is None else ratio) * count))
