"""Scores that were given before, in one SQLite file: nothing is scored twice, whatever was stopped or killed in between."""

from __future__ import annotations

import hashlib
import math
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flowalign.errors import DataError, RunError
from flowalign.scoring.rewards.base import Card

FILE = "scores.sqlite"
WAIT = 60.0
"""Seconds that one process waits for another to finish writing."""
TABLES = ("scores (key BLOB PRIMARY KEY, score REAL NOT NULL)", "alone (key BLOB PRIMARY KEY)")
Name = tuple[str, str]
"""sha256 of a picture, and a prompt."""


class ScoreCache:
    """Scores by (picture, prompt, reward's fingerprint); where a reward reads no prompt, by the other two.

    Threads, and processes of one machine, may use a file at once; of two that score the same, the first is believed. What was
    written survives a kill at any instant. Raises DataError for a file that is no such cache, and later RunError for one that
    can no longer be read or written, such as on a full disk.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._threads = threading.local()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._set_up()
        except (OSError, sqlite3.Error) as error:
            said = f"{self.path} is not a cache of scores ({error}); move it away or choose another folder with --cache."
            raise DataError(said) from error

    def _set_up(self) -> None:
        until = time.monotonic() + WAIT
        while True:
            try:
                self._open.execute("PRAGMA journal_mode = WAL")  # does not wait for another process that does the same
                for table in TABLES:
                    self._open.execute(f"CREATE TABLE IF NOT EXISTS {table} WITHOUT ROWID")
                # Asked of every picture, and nearly always of an empty table. What another process sets apart later is seen
                # by the next one that opens the file; until then it only fails in company once more.
                (self._some_apart,) = self._open.execute("SELECT EXISTS (SELECT 1 FROM alone)").fetchone()
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    @property
    def _open(self) -> sqlite3.Connection:
        """A connection of this thread's own, which is closed when the thread is gone."""
        if not hasattr(self._threads, "connection"):
            self._threads.connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            self._threads.connection.execute("PRAGMA synchronous = NORMAL")
        return self._threads.connection

    def find(self, cards: Sequence[Card], picture: str, prompt: str) -> dict[str, float]:
        """The scores of a picture that are known, by reward."""
        keys = {card.name: _key(card, picture, prompt) for card in cards}
        query = f"SELECT key, score FROM scores WHERE key IN ({_marks(keys)})"
        with self._working() as connection:
            known = dict(connection.execute(query, (*keys.values(),)).fetchall())
        return {name: float(known[key]) for name, key in keys.items() if key in known}

    def add(self, given: Sequence[tuple[Card, Mapping[Name, float]]]) -> list[dict[Name, float]]:
        """Keep scores by several rewards: all of them or, if the process is killed, none. Returns the ones that stand, which
        are those of another process where it was earlier; what is not finite is not kept."""
        with self._writing() as connection:
            stand = []
            for card, scores in given:
                keys = {name: _key(card, *name) for name, score in scores.items() if math.isfinite(score)}
                rows = [(key, scores[name]) for name, key in keys.items()]
                new = connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", rows).rowcount
                known = {}
                if new != len(rows):
                    one = "SELECT score FROM scores WHERE key = ?"
                    known = {name: connection.execute(one, (key,)).fetchone()[0] for name, key in keys.items()}
                stand.append(dict(scores) | known)
        return stand

    def set_apart(self, cards: Iterable[Card], names: Iterable[Name]) -> None:
        """Remember that these failed together and are scored one by one, also when they come again."""
        keys = {_key(card, *name) for name in names for card in cards}
        with self._writing() as connection:
            connection.executemany("INSERT OR IGNORE INTO alone VALUES (?)", [(key,) for key in sorted(keys)])
        self._some_apart = True

    def is_apart(self, cards: Sequence[Card], picture: str, prompt: str) -> bool:
        """Whether it was `set_apart` for each of these."""
        if not self._some_apart:
            return False
        keys = [_key(card, picture, prompt) for card in cards]
        with self._working() as connection:
            (count,) = connection.execute(f"SELECT count(*) FROM alone WHERE key IN ({_marks(keys)})", keys).fetchone()
        return count == len(set(keys))

    @contextmanager
    def _working(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._open
        except sqlite3.Error as error:
            raise RunError(
                f"the cache {self.path} can no longer be used ({error}); make room, or move it away, and run the same again."
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._working() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection


def _marks(keys: Collection[object]) -> str:
    return ", ".join("?" * len(keys))


def _key(card: Card, picture: str, prompt: str) -> bytes:
    parts = (card.fingerprint, picture, prompt if card.reads_prompt else "")
    return hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
