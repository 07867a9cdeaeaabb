"""From a configuration to cached comparisons: open, split, encode what is missing, count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flowalign.config import Config
from flowalign.data.audit import audit
from flowalign.data.cache import LatentCache
from flowalign.data.fill import Cached, fill
from flowalign.data.pairs import PairDataset
from flowalign.data.readers import Comparisons, open_comparisons, split_by_prompt, write_bad_rows
from flowalign.errors import DataError
from flowalign.families.base import Family
from flowalign.train.ranks import Ranks


def cache_folder(folder: str | Path | None) -> Path:
    """The folder given, else $FLOWALIGN_CACHE, else ~/.cache/flowalign."""
    return Path(folder or os.environ.get("FLOWALIGN_CACHE") or Path.home() / ".cache" / "flowalign")


def load_data(
    config: Config, family: Family, folder: Path, progress: bool, ranks: Ranks
) -> tuple[PairDataset, PairDataset | None, dict[str, Any]]:
    """Open, split and cache the comparisons; the encoders leave memory afterwards."""
    data = config.data
    resolution = data.resolution or family.resolution

    def open_(source: str, limit: int | None) -> Comparisons:
        return open_comparisons(
            source, format=data.format, columns=data.columns, split=data.split, tie_policy=data.tie_policy, limit=limit
        )

    cache = LatentCache(
        cache_folder(data.cache),
        family.fingerprint("images"),
        family.fingerprint("prompts"),
        resolution=resolution,
        checkpoint=config.model.checkpoint,
    )
    train = open_(data.train, data.limit)
    if data.validation is not None:
        held, train_places, held_places = open_(data.validation, None), range(len(train)), None
    else:
        train_places, held_places = split_by_prompt(train, data.held_out, config.train.seed)
        held = train

    def cached(source: Comparisons, places: Any, flips: tuple[bool, ...]) -> Cached:
        return fill(
            cache,
            source,
            places,
            family,
            flips=flips,
            on_bad_row=data.on_bad_row,
            ranks=ranks,
            progress=progress and ranks.main,
        )

    train_cached = cached(train, train_places, (False, True) if data.flip else (False,))
    places = range(len(held)) if held_places is None else held_places
    held_cached = cached(held, places, (False,)) if len(places) else None
    family.release_encoders()
    if held_cached is not None and held_cached.num_chosen != train_cached.num_chosen:
        raise DataError(
            f"data.validation has {held_cached.num_chosen} chosen pictures a comparison and data.train "
            f"{train_cached.num_chosen}; validate on comparisons of the same kind."
        )
    bad = [*train_cached.bad, *(held_cached.bad if held_cached else ())]
    if ranks.main:
        write_bad_rows(folder / "bad_rows.jsonl", bad)
    summary = {
        "train": audit(train, train_cached.indices),
        "held_out": audit(held, held_cached.indices) if held_cached else None,
        "bad_rows": len(bad),
        "resolution": resolution,
        "sources": {"train": data.train, "validation": data.validation or f"{data.held_out:.0%} of the prompts of train"},
    }
    return PairDataset(cache, train_cached), PairDataset(cache, held_cached) if held_cached else None, summary
