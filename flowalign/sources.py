"""From a configuration to cached comparisons: open, split, encode what is missing, count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flowalign.align.personal import names_of
from flowalign.data.audit import audit
from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached
from flowalign.data.fill import fill
from flowalign.data.index import index_path, read_index, write_index
from flowalign.data.pairs import PairDataset
from flowalign.data.readers import Comparisons, open_comparisons, split_by_prompt, stamp, write_bad_rows
from flowalign.families.base import Family
from flowalign.settings import Config, Data
from flowalign.train.ranks import Ranks


def cache_folder(folder: str | Path | None) -> Path:
    """The folder given, else $FLOWALIGN_CACHE, else ~/.cache/flowalign."""
    return Path(folder or os.environ.get("FLOWALIGN_CACHE") or Path.home() / ".cache" / "flowalign")


def open_source(data: Data, source: str, limit: int | None) -> Comparisons:
    """The comparisons of `source`, read as `data` says."""
    return open_comparisons(
        source,
        format=data.format,
        columns=data.columns,
        split=data.split,
        tie_policy=data.tie_policy,
        order=data.order,
        limit=limit,
    )


def load_data(
    config: Config, family: Family, folder: Path, progress: bool, ranks: Ranks
) -> tuple[PairDataset, PairDataset | None, dict[str, Any]]:
    """Open, split and cache the comparisons; the encoders leave memory afterwards."""
    data, attached = config.data, _attached(config)
    scores = config.steer is not None and config.steer.condition == "scores"
    resolution = data.resolution or family.resolution

    cache = LatentCache(
        cache_folder(data.cache),
        family.fingerprint("images"),
        family.fingerprint("prompts"),
        resolution=resolution,
        checkpoint=config.model.checkpoint,
    )
    index = _index(config, cache)
    known = read_index(index, cache) if index else None
    if ranks.any(known is None):
        known = None  # all of them fill, or none does
    if known is not None:
        parts, counts = known
    else:
        train = open_source(data, data.train, data.limit)
        if data.validation is not None:
            held, train_places = open_source(data, data.validation, None), range(len(train))
            held_places: Any = range(len(held))
        else:
            held, (train_places, held_places) = train, split_by_prompt(train, data.held_out, config.train.seed)

        def cached(source: Comparisons, places: Any, flips: tuple[bool, ...]) -> Cached:
            return fill(
                cache,
                source,
                places,
                family,
                flips=flips,
                on_bad_row=data.on_bad_row,
                rewards=data.rewards,
                attached=attached,
                objectives=config.steer.objectives if config.steer else (),
                in_words=config.steer is not None and config.steer.form == "prompt" and not scores,
                by_picture=scores,
                ranks=ranks,
                progress=progress and ranks.main,
            )

        parts = {"train": cached(train, train_places, (False, True) if data.flip else (False,))}
        if len(held_places):
            parts["held_out"] = cached(held, held_places, (False,))
        sources = {"train": train, "held_out": held}
        counts = {name: audit(sources[name], part.indices) for name, part in parts.items()}
        if index and ranks.main and all(part.inside for part in parts.values()):
            write_index(index, parts, counts)
    family.release_encoders()
    bad = [row for part in parts.values() for row in part.bad]
    if ranks.main:
        write_bad_rows(folder / "bad_rows.jsonl", bad)
    summary = {
        "train": counts["train"],
        "held_out": counts.get("held_out"),
        "bad_rows": len(bad),
        "resolution": resolution,
        "sources": {"train": data.train, "validation": data.validation or f"{data.held_out:.0%} of the prompts of train"},
    }
    users = names_of(config.users, parts["train"])
    judge = config.users.new if config.users else None
    sets = {name: PairDataset(cache, part, users=users, judge=judge, by_picture=scores) for name, part in parts.items()}
    return sets["train"], sets.get("held_out"), summary


def _attached(config: Config) -> tuple[str, ...]:
    """What rows attach to their pictures and the configuration uses."""
    switches = config.switches
    used = {"mask": switches.mask == "given", "noise": switches.noise == "stored"}
    return tuple(name for name, use in used.items() if use)


def _index(config: Config, cache: LatentCache) -> Path | None:
    """Where what is found out about the sources is kept; None where their pictures may change without them."""
    data = config.data
    stamps = [stamp(source, format=data.format, split=data.split) for source in (data.train, data.validation) if source]
    if None in stamps:
        return None
    passing = {"train", "validation", "cache", "workers"}  # what the stamps say, and what changes nothing
    how = data.model_dump(mode="json", exclude=passing) | {"attached": _attached(config)}
    read = {"objectives", "form", "condition"}
    read = {"objectives", "form", "condition"}
    how |= {"steer": config.steer.model_dump(mode="json", include=read) if config.steer else None}
    return index_path(cache, {"stamps": stamps, "seed": config.train.seed, **how})
