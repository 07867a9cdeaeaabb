"""Scores every picture of a source by several rewards, in one pass and in constant memory.

Threads read, decode and prepare pictures (Pillow, resizing and hashing run outside of Python's lock, so that they neither
start processes nor copy pictures between them); the calling thread runs one forward per backbone and batch. What a reward
cannot score is null in the table with the reason beside it, and the rest goes on.

Which pictures and prompts share a forward depends on the source and the batch size only, not on what was scored before a kill,
because the last bits of a score may depend on it: batches end with their stretch of the source, what failed stands apart for
good, and a batch reads its prompts anew.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from flowalign.data.images import decode
from flowalign.errors import DataError
from flowalign.scoring.cache import Name, ScoreCache
from flowalign.scoring.rewards.base import Backbone, Card, Reward, checked
from flowalign.scoring.scored import Counts, Scored, cells, said_by, unreadable, write_blocks
from flowalign.scoring.sources import Item, Items

STRETCH = 512
"""Rows that are written together, and that a worker of a cluster gets at a time; with larger batches it is one of them."""
AHEAD = 3
"""Batches that are read and prepared before they are needed."""
EARLY = 64
"""Rows after which a reward that has scored none of them is told."""
MOST = 8
"""Batches of known rows that wait for a batch to fill up."""
HANDFUL = 8
"""Rows that a thread reads and prepares at a time, at most a batch."""


class _Failure(NamedTuple):
    """What of an error is kept: not the error, through whose frames all that the tower had computed would stay in memory."""

    why: str
    is_memory: bool

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        return cls(said_by(error), isinstance(error, torch.OutOfMemoryError))


class _Recent:
    """Which pictures were among the last rows: those may have been scored since a row of the same one was looked up."""

    def __init__(self, rows: int) -> None:
        self._rows, self._count = rows, 0
        self._last: dict[str | None, int] = {}

    def before(self, row: Scored) -> bool:
        """Whether the row's picture was there lately; it is now."""
        was = self._last.get(row.image)
        self._last[row.image], self._count = self._count, self._count + 1
        if len(self._last) > 2 * self._rows:
            self._last = {image: place for image, place in self._last.items() if place >= self._count - self._rows}
        return was is not None and was >= self._count - 1 - self._rows


class Scorer:
    """Scores rows of a source, from the cache where it knows them."""

    def __init__(self, rewards: Sequence[Reward], cache: ScoreCache, *, batch_size: int = 32, workers: int = 2) -> None:
        self.rewards, self.cache, self.batch_size, self.workers = tuple(rewards), cache, batch_size, workers
        self.backbones = {reward.backbone.key: reward.backbone for reward in rewards}
        self.cards = {reward.card.name: reward.card for reward in rewards}

    @property
    def stretch(self) -> int:
        """How many rows from the source's first, again and again, share no batch with others: whole batches, `STRETCH` rows
        or a few more."""
        return -(-STRETCH // self.batch_size) * self.batch_size

    def rows(self, items: Items, places: Sequence[int]) -> Iterator[Scored]:
        """The rows of these places, scored, in their order."""
        waiting: list[Scored] = []  # in order; the last of them may still lack scores
        lacking: list[Scored] = []
        seen = _Recent((AHEAD + MOST + 1) * self.batch_size)
        for place, row in zip(places, self._prepared(items, places), strict=True):
            waiting.append(row)
            if not row.inputs or (seen.before(row) and not self._look_up(row)):
                row.inputs = {}
            elif self._is_apart(row):
                self._forward([row])
            else:
                lacking.append(row)
            full = len(lacking) == self.batch_size or len(waiting) == MOST * self.batch_size
            if lacking and (full or (place + 1) % self.stretch == 0):
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
        size = min(HANDFUL, self.batch_size)
        handfuls = (places[start : start + size] for start in range(0, len(places), size))
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:

            def submitted(count: int) -> Iterator[Future[list[Scored]]]:
                return (pool.submit(self._prepare_all, items, some) for some in islice(handfuls, count))

            ahead = deque(submitted(AHEAD * self.batch_size // size))
            try:
                while ahead:
                    rows = ahead.popleft().result()
                    ahead.extend(submitted(1))
                    yield from rows
            finally:
                for each in ahead:
                    each.cancel()

    def _prepare_all(self, items: Items, places: Sequence[int]) -> list[Scored]:
        return [self._prepare(items, place) for place in places]

    def _prepare(self, items: Items, place: int) -> Scored:
        try:
            item = items.item(place)
        except Exception as error:  # a table or archive may be damaged in the middle: this row only
            return Scored(Item(None, items.where(place)), None, why=dict.fromkeys(self.cards, said_by(error)))
        row = Scored(item, None)
        for name, card in self.cards.items():
            if card.reads_prompt and (said := unreadable(item.prompt)):
                row.why[name] = said
        try:
            data = item.image.read() if item.image is not None else b""
        except Exception as error:
            row.why = dict.fromkeys(self.cards, said_by(error))
            return row
        row.image = hashlib.sha256(data).hexdigest()
        if self._look_up(row):
            try:
                self._to_inputs(row, decode(data))
            except DataError as error:
                row.image, row.why = None, dict.fromkeys(self.cards, str(error))
        return row

    def _to_inputs(self, row: Scored, picture: Image.Image) -> None:
        for key, backbone in self.backbones.items():
            lacking = [each.card.name for each in self._judges(backbone) if row.lacks(each.card.name)]
            if lacking:
                try:
                    row.inputs[key] = backbone.prepare(picture)
                except Exception as error:  # what a tower's preprocessing cannot take concerns this picture only
                    row.why |= dict.fromkeys(lacking, said_by(error))

    def _judges(self, backbone: Backbone) -> list[Reward]:
        return [reward for reward in self.rewards if reward.backbone.key == backbone.key]

    def _look_up(self, row: Scored) -> bool:
        """Take from the cache what it knows; whether something is still lacking."""
        known = self.cache.find(self._lacked(row), *row.name)
        row.scores |= known
        row.cached += len(known)
        return any(map(row.lacks, self.cards))

    def _lacked(self, row: Scored) -> list[Card]:
        return [card for name, card in self.cards.items() if row.lacks(name)]

    def _is_apart(self, row: Scored) -> bool:
        """Whether all that a row lacks failed in a batch before."""
        return self.cache.is_apart(self._lacked(row), *row.name)

    def _forward(self, rows: Sequence[Scored]) -> None:
        """Score what is lacking: one forward per backbone over distinct pictures, then each reward, then into the cache."""
        for backbone in self.backbones.values():
            judges = self._judges(backbone)
            names = [reward.card.name for reward in judges]
            wanting = [row for row in rows if any(map(row.lacks, names))]
            told = any(reward.card.reads_prompt for reward in judges)  # else one picture under several prompts is one
            distinct: dict[Name, Scored] = {}
            for row in wanting:
                distinct.setdefault(row.name if told else (row.name[0], ""), row)
            if distinct:
                self._judge(backbone, judges, list(distinct.values()))
            for row in wanting:
                first = distinct[row.name if told else (row.name[0], "")]
                for name in filter(row.lacks, names):  # the same once more
                    row.scores |= {name: first.scores[name]} if name in first.scores else {}
                    row.why |= {name: first.why[name]} if name in first.why else {}
        for row in rows:
            row.inputs = {}

    @torch.inference_mode()
    def _judge(self, backbone: Backbone, judges: Sequence[Reward], rows: Sequence[Scored]) -> None:
        """Score rows, or note why not. What fails for a batch is tried again row by row: one picture may have spoilt it."""
        backbone.forget()
        failure = None
        try:
            features = backbone.see([row.inputs[backbone.key] for row in rows])
        except Exception as error:
            failure = _Failure.of(error)
        if failure is not None:  # out of the except block, which would hold the error
            self._failed(failure, backbone, judges, rows)
            return
        for row in rows:
            row.forwards += 1
        prompts = [row.item.prompt or "" for row in rows]
        readable = ["-" if unreadable(prompt) else prompt for prompt in prompts]  # those rows have a reason already
        found, failures = [], []
        for reward in judges:
            lacking = [place for place, row in enumerate(rows) if row.lacks(reward.card.name)]
            if lacking:
                try:
                    scores = checked(reward, reward.judge(features, readable), prompts).tolist()
                    found.append((reward.card, {rows[place].name: scores[place] for place in lacking}))
                except Exception as error:
                    failures.append((_Failure.of(error), reward, [rows[place] for place in lacking]))
        del features  # before some of it is computed again
        for (card, _), stand in zip(found, self.cache.add(found), strict=True):
            for row in rows:
                if row.name in stand and row.lacks(card.name):
                    row.scores[card.name] = stand[row.name]
        for failed, reward, those in failures:
            self._failed(failed, backbone, [reward], those)

    def _failed(self, failure: _Failure, backbone: Backbone, judges: Sequence[Reward], rows: Sequence[Scored]) -> None:
        if len(rows) == 1:
            rows[0].why |= dict.fromkeys([each.card.name for each in judges if rows[0].lacks(each.card.name)], failure.why)
        elif failure.is_memory:  # no picture's fault
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                self._judge(backbone, judges, half)
        else:
            self.cache.set_apart([reward.card for reward in judges], [row.name for row in rows])
            for row in rows:
                self._judge(backbone, judges, [row])


def score(items: Items, scorer: Scorer, out: Path, *, limit: int | None = None, progress: bool = True) -> Counts:
    """Score a source into the Parquet file `out`, which appears when it is whole; see `table.ScoreTable`."""
    places = range(len(items) if limit is None else min(limit, len(items)))
    with tqdm(total=len(places), unit="picture", desc="score", disable=not progress) as bar:
        rows = _watched(scorer.rows(items, places), scorer, bar)
        blocks = iter(lambda: list(islice(rows, scorer.stretch)), [])
        return write_blocks((cells(block, scorer.cards) for block in blocks), scorer.cards, out)


def _watched(rows: Iterator[Scored], scorer: Scorer, bar: Any) -> Iterator[Scored]:
    """Rows as they pass, counted; a reward that fails for all of the first ones is told while there is time to stop."""
    failing = dict.fromkeys(scorer.cards, "")
    for number, row in enumerate(rows, 1):
        failing = {name: why or row.why.get(name, "") for name, why in failing.items() if name not in row.scores}
        if number == EARLY and not bar.disable:
            for name, why in failing.items():
                bar.write(f"{name} has scored none of the first {EARLY} pictures: {why}", file=sys.stderr)
        yield row
        bar.update(1)
