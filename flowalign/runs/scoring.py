"""Verbs that score pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.device import choose_device
from flowalign.errors import ConfigError, RunError, allowed
from flowalign.families.sampling import PRECISIONS
from flowalign.report.scores import write_scores_page
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import Scorer
from flowalign.scoring.engine import score as score_items
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf
from flowalign.scoring.sources import Items, open_items
from flowalign.scoring.table import ScoreTable, read_table
from flowalign.sources import cache_folder

ENGINES = ("local", "ray")


def score(
    source: str,
    rewards: Sequence[str | Mapping[str, Any]],
    *,
    out: Path = Path("scores.parquet"),
    prompt: str | None = None,
    image_column: str | None = None,
    prompt_column: str | None = None,
    format: str = "auto",
    split: str = "train",
    limit: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
    precision: str = "fp32",
    cache: Path | None = None,
    engine: str = "local",
    replicas: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Score pictures by several rewards into the table `out`, see `scoring.table`. What was scored before is not scored again.

    source, prompt, image_column, prompt_column, format, split: see `scoring.sources.open_items`. rewards: see
    `scoring.loading.load_rewards`. workers: threads that decode. engine: one of `ENGINES`; "ray" scores on a cluster with so
    many `replicas` of the rewards, each on a GPU of its own where `device` is one. Raises UserError for what cannot be opened
    or named, RunError where no picture could be scored.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}; {allowed(engine, ENGINES)}.")
    if out.suffix != ".parquet":
        raise ConfigError(f"out is {out}; a score table is a Parquet file, so give a name that ends with .parquet.")
    folder = cache_folder(cache).absolute()

    def opened() -> tuple[Items, Scorer]:
        items = open_items(
            source, format=format, image_column=image_column, prompt_column=prompt_column, prompt=prompt, split=split
        )
        loaded = load_rewards(rewards, Shelf(choose_device(device), PRECISIONS[precision]))
        return items, Scorer(loaded, ScoreCache(folder), batch_size=batch_size, workers=workers)

    items, scorer = opened()
    started = time.perf_counter()
    if engine == "local":
        counts = score_items(items, scorer, out, limit=limit, progress=progress)
    else:
        from flowalign.scoring.ray_engine import score_on_ray

        cards = {reward.card.name: reward.card for reward in scorer.rewards}
        count, gpus = len(items) if limit is None else min(limit, len(items)), float(choose_device(device).type == "cuda")
        counts = score_on_ray(opened, cards, count, out, replicas=replicas, gpus=gpus, progress=progress)
    seconds = time.perf_counter() - started
    if not counts.scored:
        said = f"; the first: {counts.problems[0]}" if counts.problems else ""
        raise RunError(f"none of the {counts.rows} pictures of {source} could be scored{said}")
    table = read_table(out)
    figures = {name: figures_of(table.raw(name)) for name in table.rewards}
    page = write_scores_page(table, out.with_suffix(".html"))
    return {
        "table": str(out),
        "page": str(page),
        **asdict(counts),
        "seconds": seconds,
        "pictures_per_second": counts.rows / seconds,
        "rewards": figures,
        "summary": "\n".join(
            [*_lines(table, figures), *_problems(counts.failed, counts.problems), f"table: {out}", f"page: {page}"]
        ),
    }


def figures_of(scores: NDArray[np.float64]) -> dict[str, float | int | None]:
    """n, failed, mean, sd, min, median and max of raw scores with NaN where there is none; None where nothing was scored."""
    known = scores[~np.isnan(scores)]
    out: dict[str, float | int | None] = {"n": len(known), "failed": len(scores) - len(known)}
    for name, measure in (("mean", np.mean), ("sd", np.std), ("min", np.min), ("median", np.median), ("max", np.max)):
        out[name] = float(measure(known)) if len(known) else None
    return out


def _lines(table: ScoreTable, figures: Mapping[str, Mapping[str, float | int | None]]) -> list[str]:
    columns = ("n", "failed", "mean", "sd", "min", "median", "max")
    wide = max(len("reward"), *(len(name) for name in figures))
    lines = [f"{'reward':{wide}}  better  " + "  ".join(f"{column:>8}" for column in columns)]
    for name, row in figures.items():
        cells = (f"{row[column]:>8}" if column in ("n", "failed") else f"{_short(row[column]):>8}" for column in columns)
        lines.append(
            f"{name:{wide}}  {table.cards[name].better}  "
            + (" " if table.cards[name].better == "lower" else "")
            + "  ".join(cells)
        )
    return lines


def _short(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 or not math.isfinite(value) else f"{value:.1e}"


def _problems(failed: int, problems: Sequence[str], shown: int = 5) -> list[str]:
    if not failed:
        return []
    more = [f"  and {failed - shown} more, see the columns why.*"] if failed > shown else []
    return [f"{failed} pictures lack a score:", *(f"  {problem}" for problem in problems[:shown]), *more]
