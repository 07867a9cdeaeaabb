"""Scores every picture of a source by several rewards, in one pass and in constant memory.

Threads read, decode and prepare pictures (Pillow, resizing and hashing run outside of Python's lock, so that they neither
start processes nor copy pictures between them); the calling thread runs one forward per backbone and batch. What a reward
cannot score is null in the table with the reason beside it, and the rest goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from flowalign.data.images import decode
from flowalign.errors import DataError, FlowalignError, reason
from flowalign.files import atomic
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.rewards.base import Backbone, Card, Reward, checked
from flowalign.scoring.sources import Item, Items
from flowalign.scoring.table import IDENTITY, RAW, WHY, metadata

BLOCK = 1024
"""Rows that are written together."""
COUNTED = ("forwards", "cached")
PROBLEMS = 20
"""Rows without a score of which the reason is told at the end."""
AHEAD = 3
"""Batches that are read and prepared before they are needed."""
MOST = 8
"""Batches of known rows that wait for a batch to fill up."""


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
    """Backbones that it went through."""
    cached: int = 0
    """Scores that were known."""

    @property
    def name(self) -> tuple[str, str]:
        """What the cache knows the row by."""
        return self.image or "", self.item.prompt or ""


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


class Scorer:
    """Scores rows of a source, from the cache where it knows them."""

    def __init__(self, rewards: Sequence[Reward], cache: ScoreCache, *, batch_size: int = 32, workers: int = 2) -> None:
        self.rewards, self.cache, self.batch_size, self.workers = tuple(rewards), cache, batch_size, workers
        self.backbones = {reward.backbone.key: reward.backbone for reward in rewards}

    def rows(self, items: Items, places: Sequence[int]) -> Iterator[Scored]:
        """The rows of these places, scored, in their order."""
        waiting: list[Scored] = []  # in order; the last of them may still lack scores
        lacking: list[Scored] = []
        for row in self._prepared(items, places):
            waiting.append(row)
            row_lacks = bool(row.inputs) and self._look_up(row)  # once more: a row before it may have been the same picture
            if row_lacks:
                lacking.append(row)
            if lacking and (len(lacking) == self.batch_size or len(waiting) == MOST * self.batch_size):
                self._forward(lacking)
                lacking = []
            if not lacking:
                yield from waiting
                waiting = []
        if lacking:
            self._forward(lacking)
        yield from waiting

    def _prepared(self, items: Items, places: Sequence[int]) -> Iterator[Scored]:
        """Rows read and prepared by threads, a few batches ahead."""
        remaining = iter(places)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            ahead = [pool.submit(self._prepare, items, place) for place in islice(remaining, AHEAD * self.batch_size)]
            try:
                while ahead:
                    row = ahead.pop(0).result()
                    ahead += [pool.submit(self._prepare, items, place) for place in islice(remaining, 1)]
                    yield row
            finally:
                for each in ahead:
                    each.cancel()

    def _prepare(self, items: Items, place: int) -> Scored:
        try:
            item = items.item(place)
        except DataError as error:
            return Scored(Item(None, items.where(place)), None, why=dict.fromkeys(self._names, str(error)))
        row = Scored(item, None)
        try:
            data = item.image.read() if item.image is not None else b""
            row.image = hashlib.sha256(data).hexdigest()
            for reward in self.rewards:
                if reward.card.reads_prompt and (said := unreadable(item.prompt)):
                    row.why[reward.card.name] = said
            if self._look_up(row):
                self._to_inputs(row, decode(data))
        except DataError as error:
            row.image, row.why = None, dict.fromkeys(self._names, str(error))
        return row

    def _to_inputs(self, row: Scored, picture: Image.Image) -> None:
        for key, backbone in self.backbones.items():
            lacking = [each.card.name for each in self.rewards if each.backbone.key == key and self._lacks(row, each)]
            if lacking:
                try:
                    row.inputs[key] = backbone.prepare(picture)
                except Exception as error:  # what a tower's preprocessing cannot take concerns this picture only
                    row.why |= dict.fromkeys(lacking, _said(error))

    @property
    def _names(self) -> list[str]:
        return [reward.card.name for reward in self.rewards]

    def _lacks(self, row: Scored, reward: Reward) -> bool:
        return reward.card.name not in row.scores and reward.card.name not in row.why

    def _look_up(self, row: Scored) -> bool:
        """Take from the cache what it knows; whether something is still lacking."""
        for reward in self.rewards:
            if self._lacks(row, reward):
                known = self.cache.find(reward.card, *row.name)
                if known is not None:
                    row.scores[reward.card.name] = known
                    row.cached += 1
        return any(self._lacks(row, reward) for reward in self.rewards)

    def _forward(self, rows: Sequence[Scored]) -> None:
        """Score what is lacking: one forward per backbone over distinct pictures, then each reward, then into the cache."""
        for key, backbone in self.backbones.items():
            judges = [reward for reward in self.rewards if reward.backbone.key == key]
            wanting = [row for row in rows if any(self._lacks(row, reward) for reward in judges)]
            distinct = list({row.name: row for row in wanting}.values())
            if not distinct:
                continue
            self._judge(backbone, judges, distinct)
            known = {row.name: row for row in distinct}
            for row in wanting:
                for reward in judges:
                    if self._lacks(row, reward):  # the same picture and prompt once more
                        first, name = known[row.name], reward.card.name
                        row.scores |= {name: first.scores[name]} if name in first.scores else {}
                        row.why |= {name: first.why[name]} if name in first.why else {}
        for row in rows:
            row.inputs = {}

    @torch.inference_mode()
    def _judge(self, backbone: Backbone, judges: Sequence[Reward], rows: Sequence[Scored]) -> None:
        """Score rows, or note why not. What fails for a batch is tried again row by row: one picture may have spoilt it."""
        try:
            features = backbone.see([row.inputs[backbone.key] for row in rows])
        except Exception as error:
            self._failed(error, backbone, judges, rows)
            return
        for row in rows:
            row.forwards += 1
        prompts = [row.item.prompt or "" for row in rows]
        readable = ["-" if unreadable(prompt) else prompt for prompt in prompts]  # those rows have a reason already
        for reward in judges:
            lacking = [place for place, row in enumerate(rows) if self._lacks(row, reward)]
            if lacking:
                try:
                    found = checked(reward, reward.judge(features, readable), prompts).tolist()
                except Exception as error:
                    self._failed(error, backbone, [reward], [rows[place] for place in lacking])
                    continue
                self.cache.add(reward.card, {rows[place].name: found[place] for place in lacking})
                for place in lacking:
                    rows[place].scores[reward.card.name] = found[place]

    def _failed(self, error: Exception, backbone: Backbone, judges: Sequence[Reward], rows: Sequence[Scored]) -> None:
        if len(rows) > 1:
            for row in rows:
                self._judge(backbone, judges, [row])
        else:
            lacking = [reward.card.name for reward in judges if self._lacks(rows[0], reward)]
            rows[0].why |= dict.fromkeys(lacking, _said(error))


def score(items: Items, scorer: Scorer, out: Path, *, limit: int | None = None, progress: bool = True) -> Counts:
    """Score a source into the Parquet file `out`, which appears when it is whole; see `table.ScoreTable`."""
    places = range(len(items) if limit is None else min(limit, len(items)))
    cards = {reward.card.name: reward.card for reward in scorer.rewards}
    rows = scorer.rows(items, places)
    blocks = iter(lambda: list(islice(rows, BLOCK)), [])
    with tqdm(total=len(places), unit="picture", desc="score", disable=not progress) as bar:
        return write_blocks((cells(block, cards) for block in _counted(blocks, bar)), cards, out)


def _counted(blocks: Iterator[list[Scored]], bar: Any) -> Iterator[list[Scored]]:
    for block in blocks:
        yield block
        bar.update(len(block))


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


def _cell(row: Scored, cards: Mapping[str, Card]) -> dict[str, Any]:
    item, prompt = row.item, row.item.prompt
    found: dict[str, Any] = {"image": row.image, "path": item.path, "generator": item.generator, "seed": item.seed}
    found["prompt"] = None if prompt is None else prompt.encode("utf-8", "replace").decode()
    for name in cards:
        found[RAW + name], found[WHY + name] = row.scores.get(name), row.why.get(name)
    return found | {"forwards": row.forwards, "cached": row.cached}


def _said(error: Exception) -> str:
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
