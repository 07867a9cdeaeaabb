"""From a configuration to cached comparisons: open, split, encode what is missing, count."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flowalign import plugins
from flowalign.align.personal import names_of
from flowalign.align.switches import reads
from flowalign.data.audit import audit
from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached, digest
from flowalign.data.fill import fill
from flowalign.data.forecast import Count
from flowalign.data.index import Known, index_path, read_index, write_index
from flowalign.data.pairs import PairDataset
from flowalign.data.reach import Reach, Tried, Usable, some_of
from flowalign.data.readers import Comparisons, open_comparisons, split_by_prompt, stamp, write_bad_rows
from flowalign.data.texts import Texts, read_texts
from flowalign.errors import DataError, NoneUsableError
from flowalign.families.base import Family
from flowalign.sections import Data
from flowalign.settings import Config
from flowalign.train.ranks import Ranks

OWN_BATCHES = 16
"""Of the run's own, that `suggest-beta` looks at where nothing is held out."""
FIRST = 8
"""Comparisons that `importance` measures gains on before the first step."""
INDEX_FORM = 2
"""Of what an index holds; one of another form is not looked at."""


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


def split(data: Data, train: Comparisons, seed: int, texts: Texts | None = None) -> tuple[Comparisons, np.ndarray, np.ndarray]:
    """Where held-out comparisons are, places in `train` to train on, and places of the held-out ones.

    texts: of `train`, where they were read with this seed already.
    """
    limit = data.validation_limit
    if data.validation is not None:
        held = open_source(data, data.validation, None)
        return held, np.arange(len(train)), some_of(len(held), limit, seed)
    if texts is not None:
        return train, *texts.split(data.held_out, limit)
    return train, *split_by_prompt(train, data.held_out, seed, limit)


def prepares_all(config: Config) -> bool:
    """Whether a run looks at something of all its training comparisons, however few of them its steps see.

    A bank covers them; a steered, personal or mixed policy, and an objective that reads scores or grades, must know that every
    row says what they need, or who there is; masks are read where one row has one.
    """
    needs = plugins.load("objectives", config.objective.name).needs | reads(config.switches)
    return bool(
        config.reference.bank is not None
        or config.steer is not None
        or config.users is not None
        or config.switches.annotator_types > 1
        or _attached(config)
        or needs & {"scores", "grades"}
    )


def reach_of(config: Config, processes: int) -> Reach:
    """How far a run looks into its training data: what its steps see, and what is looked at before the first."""
    train = config.train
    batches = max(train.steps * train.accumulation, OWN_BATCHES)
    return Reach(batches * train.batch_size * processes, FIRST, 0 if config.sample.prompts else config.sample.count)


def load_data(
    config: Config, family: Family, folder: Path, progress: bool, ranks: Ranks
) -> tuple[PairDataset, PairDataset | None, dict[str, Any]]:
    """Open, split and cache the comparisons; the encoders leave memory afterwards.

    Of a table or archive that holds its pictures itself, only those training comparisons are cached that the run sees.
    """
    data = config.data
    scores = config.steer is not None and config.steer.condition == "scores"
    resolution = data.resolution or family.resolution
    cache = LatentCache(
        cache_folder(data.cache),
        family.fingerprint("images"),
        family.fingerprint("prompts"),
        resolution=resolution,
        checkpoint=config.model.checkpoint,
    )
    parts, counts = _Loading(config, family, cache, ranks, progress and ranks.main).parts()
    family.release_encoders()
    bad = [row for part in parts.values() for row in part.bad]
    if ranks.main:
        write_bad_rows(folder / "bad_rows.jsonl", bad)
    summary = {
        "train": counts["train"],
        "held_out": counts.get("held_out"),
        "prepared": {name: len(part) for name, part in parts.items()},
        "bad_rows": len(bad),
        "resolution": resolution,
        "sources": {"train": data.train, "validation": data.validation or f"{data.held_out:.0%} of the prompts of train"},
    }
    users = names_of(config.users, parts["train"])
    judge = config.users.new if config.users else None
    sets = {name: PairDataset(cache, part, users=users, judge=judge, by_picture=scores) for name, part in parts.items()}
    return sets["train"], sets.get("held_out"), summary


@dataclass(frozen=True)
class _Loading:
    """One start of a run, as far as its data goes."""

    config: Config
    family: Family
    cache: LatentCache
    ranks: Ranks
    progress: bool

    def parts(self) -> tuple[dict[str, Cached], dict[str, Any]]:
        """What to train and to validate on, and what each consists of; the index is read, and written where more was found."""
        index = _index(self.config, self.cache)
        known = self._agreed(read_index(index) if index else None)
        found = known or self._first()
        parts, kept, tried = found.parts, found.parts, found.tried
        if tried is not None:
            tried, reached = self._reaching(tried)
            mine = tried.of(reached)
            held = {name: part for name, part in parts.items() if name != "train"}
            parts, kept = {"train": mine, **held}, {"train": tried.cached or mine, **held}
        changed = known is None or tried is not known.tried
        if index and changed and self.ranks.main and all(part.inside for part in kept.values()):
            write_index(index, kept, found.about, tried)
        return parts, found.about

    def _agreed(self, known: Known | None) -> Known | None:
        """The index, where every process read the same and its entries are there; all of them fill, or none does."""
        told: list[Any] | None = None
        if known is not None and self._holds(known):
            broken = 0 if known.tried is None else len(known.tried.broken)
            told = [broken, *((name, len(part), digest(part.indices)) for name, part in sorted(known.parts.items()))]
        first, *others = self.ranks.gather(told)
        return known if first is not None and all(other == first for other in others) else None

    def _holds(self, known: Known) -> bool:
        """Whether the cache still has what this run needs of it."""
        parts, tried = dict(known.parts), known.tried
        if tried is not None and tried.cached is not None:
            reached = tried.usable.reached(self.config.train.seed, reach_of(self.config, self.ranks.count), tried.broken_rows)
            parts["train"] = tried.cached.only(reached[np.flatnonzero(tried.good_rows)])
        return all(self.cache.holds(each.pictures, each.flips, each.prompts) for each in parts.values())

    def _first(self) -> Known:
        """Nothing is known: open, split, count, and fill what the run sees, or all."""
        data, seed = self.config.data, self.config.train.seed
        train = self._train
        texts = None if prepares_all(self.config) else read_texts(train, seed)
        held, places, held_places = split(data, train, seed, texts)
        parts: dict[str, Cached] = {}
        tried: Tried | None = None
        if texts is None:
            parts["train"] = self._fill(train, places, self._flips)
        else:
            tried = Tried(Usable.of(texts, places))
            if tried.usable.bad and data.on_bad_row == "error":
                raise DataError(tried.usable.bad[0].reason)
            tried, _ = self._reaching(tried, texts.count)
        if len(held_places):
            count = texts.count if texts and held is train else None
            parts["held_out"] = self._fill(held, held_places, (False,), count)
        counts = {}
        for name, part in parts.items():
            source = held if name == "held_out" else train
            counts[name] = texts.audit(part.indices) if texts and source is train else audit(source, part.indices)
        if texts and tried:
            counts["train"] = texts.audit(tried.usable.rows)
        return Known(parts, counts, tried)

    def _reaching(self, tried: Tried, count: Count | None = None) -> tuple[Tried, np.ndarray]:
        """Fill what the run reaches and was not tried yet; bool `[n]` says which of all those are its."""
        reach = reach_of(self.config, self.ranks.count)
        while True:  # what turns out to be broken is stood in for by what comes next in the order
            reached = tried.usable.reached(self.config.train.seed, reach, tried.broken_rows)
            missing = tried.missing(reached)
            if not len(missing):
                return tried, reached
            try:
                cached = self._fill(self._train, missing, self._flips, count)
                tried = tried.more(replace(cached, bad=()), cached.bad)
            except NoneUsableError as error:
                tried = tried.more(None, error.bad)

    @cached_property
    def _train(self) -> Comparisons:
        return open_source(self.config.data, self.config.data.train, self.config.data.limit)

    @property
    def _flips(self) -> tuple[bool, ...]:
        return (False, True) if self.config.data.flip else (False,)

    def _fill(self, source: Comparisons, places: Any, flips: tuple[bool, ...], count: Count | None = None) -> Cached:
        steer, scores = self.config.steer, self.config.steer is not None and self.config.steer.condition == "scores"
        return fill(
            self.cache,
            source,
            places,
            self.family,
            flips=flips,
            on_bad_row=self.config.data.on_bad_row,
            rewards=self.config.data.rewards,
            attached=_attached(self.config),
            objectives=steer.objectives if steer else (),
            in_words=steer is not None and steer.form == "prompt" and not scores,
            by_picture=scores,
            count=count,
            ranks=self.ranks,
            progress=self.progress,
        )


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
    how |= {"all": prepares_all(config), "form": INDEX_FORM}
    how |= {"steer": config.steer.model_dump(mode="json", include=read) if config.steer else None}
    return index_path(cache, {"stamps": stamps, "seed": config.train.seed, **how})
