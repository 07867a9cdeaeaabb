"""Verbs that score pictures."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.data.writer import check_not_source
from flowalign.device import choose_device
from flowalign.errors import ConfigError, RunError, allowed
from flowalign.families.sampling import PRECISIONS
from flowalign.files import check_file
from flowalign.report.scores import write_scores_page
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import Scorer
from flowalign.scoring.engine import score as score_items
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Card, Shelf
from flowalign.scoring.scored import Counts
from flowalign.scoring.sources import Items, open_items
from flowalign.scoring.table import raw_scores, read_table
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
    workers: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    cache: Path | None = None,
    engine: str = "local",
    replicas: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Score pictures by several rewards into the table `out`, see `scoring.table`. What was scored before is not scored again.

    source, prompt, image_column, prompt_column, format, split: see `scoring.sources.open_items`. rewards: see
    `scoring.loading.load_rewards`. workers: threads that decode, by default one a core and at most 8. engine: one of `ENGINES`;
    "ray" scores on a cluster with so many `replicas` of the rewards, each on a GPU of its own where `device` is cuda, or auto
    and the cluster has any. Raises UserError for what cannot be opened or named, RunError where no picture could be scored.
    """
    for name, value, choices in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; {allowed(value, choices)}.")
    _check(out, source)
    folder = cache_folder(cache).absolute()
    if (here := Path(source).expanduser()).exists():
        source = str(here.absolute())  # workers of a cluster may start elsewhere

    def opened(device: str) -> tuple[Items, Scorer]:
        items = open_items(
            source, format=format, image_column=image_column, prompt_column=prompt_column, prompt=prompt, split=split
        )
        loaded = load_rewards(rewards, Shelf(choose_device(device), PRECISIONS[precision]))
        return items, Scorer(loaded, ScoreCache(folder), batch_size=batch_size, workers=workers or min(8, os.cpu_count() or 2))

    # Workers have their GPUs to themselves; the process that they answer needs the cards only.
    items, scorer = opened(device if engine == "local" else "cpu")
    started = time.perf_counter()
    if engine == "local":
        counts = score_items(items, scorer, out, limit=limit, progress=progress)
    else:
        from flowalign.scoring.ray_engine import score_on_ray

        on_gpu = device.startswith("cuda")
        counts = score_on_ray(
            lambda: opened("auto" if on_gpu else device),
            scorer.cards,
            len(items) if limit is None else min(limit, len(items)),
            out,
            block=scorer.stretch,
            replicas=replicas,
            gpus=None if device == "auto" else float(on_gpu),
            progress=progress,
        )
    seconds = time.perf_counter() - started
    if not counts.scored:
        said = f"; the first: {counts.problems[0]}" if counts.problems else ""
        raise RunError(f"none of the {counts.rows} pictures of {source} could be scored{said}")
    figures = {name: figures_of(raw_scores(out, name)) for name in scorer.cards}
    lines = _lines(scorer.cards, figures)
    page = write_scores_page(read_table(out), out.with_suffix(".html"))
    return {
        "table": str(out),
        "page": str(page),
        **asdict(counts),
        "seconds": seconds,
        "pictures_per_second": counts.rows / seconds,
        "rewards": figures,
        "summary": "\n".join(
            [*lines, *_problems(counts.failed, counts.problems), _pace(counts, seconds), f"{out}, to look at: {page}"]
        ),
    }


def _check(out: Path, source: str) -> None:
    """Before an hour of scoring rather than after it. Raises ConfigError."""
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError(f"out is {out}; a score table is a Parquet file, so give a file's name that ends with .parquet.")
    check_file(out)
    check_not_source(out, source)


def figures_of(scores: NDArray[np.float64]) -> dict[str, float | int | None]:
    """n, failed, mean, sd, min, median and max of raw scores with NaN where there is none; None where nothing was scored."""
    known = scores[~np.isnan(scores)]
    out: dict[str, float | int | None] = {"n": len(known), "failed": len(scores) - len(known)}
    for name, measure in (("mean", np.mean), ("sd", np.std), ("min", np.min), ("median", np.median), ("max", np.max)):
        out[name] = float(measure(known)) if len(known) else None
    return out


def _lines(cards: Mapping[str, Card], figures: Mapping[str, Mapping[str, float | int | None]]) -> list[str]:
    columns = ("n", "failed", "mean", "sd", "min", "median", "max")
    wide = max(len("reward"), *(len(name) for name in figures))
    lines = [f"{'reward':{wide}}  better  " + "  ".join(f"{column:>8}" for column in columns)]
    for name, row in figures.items():
        cells = (f"{row[column]:>8}" if column in ("n", "failed") else f"{_short(row[column]):>8}" for column in columns)
        lines.append(f"{name:{wide}}  {cards[name].better:6}  " + "  ".join(cells))
    return lines


def _short(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 or not math.isfinite(value) else f"{value:.1e}"


def _pace(counts: Counts, seconds: float) -> str:
    lack = f", {counts.failed} of them lack a score" if counts.failed else ""
    known = f"; {counts.cached} scores were known" if counts.cached else ""
    return f"{counts.rows} pictures in {seconds:.1f} s, {counts.rows / seconds:.1f} a second{lack}{known}"


def _problems(failed: int, problems: Sequence[str], shown: int = 5) -> list[str]:
    if not failed:
        return []
    more = [f"  and {failed - shown} more, see the columns why.*"] if failed > shown else []
    return [f"{failed} pictures lack a score:", *(f"  {problem}" for problem in problems[:shown]), *more]
