"""Scores that were given before, in one SQLite file: nothing is scored twice, whatever was stopped or killed in between."""

from __future__ import annotations

import hashlib
import math
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path

from flowalign.errors import DataError
from flowalign.scoring.rewards.base import Card

FILE = "scores.sqlite"
WAIT = 60.0
"""Seconds that one process waits for another to finish writing."""


class ScoreCache:
    """Scores by (picture, prompt, reward's fingerprint); where a reward reads no prompt, by the other two.

    Threads, and processes of one machine, may use a file at once. What was written survives a kill at any instant. Raises
    DataError for a file that is no such cache.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._threads = threading.local()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open.execute("PRAGMA journal_mode = WAL")
            self._open.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            said = f"{self.path} is not a cache of scores ({error}); move it away or choose another folder with --cache."
            raise DataError(said) from error

    @property
    def _open(self) -> sqlite3.Connection:
        """A connection of this thread's own, which is closed when the thread is gone."""
        if not hasattr(self._threads, "connection"):
            self._threads.connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            self._threads.connection.execute("PRAGMA synchronous = NORMAL")
        return self._threads.connection

    def find(self, card: Card, picture: str, prompt: str) -> float | None:
        """The score of a picture by one reward; None where it is not known."""
        row = self._open.execute("SELECT score FROM scores WHERE key = ?", (_key(card, picture, prompt),)).fetchone()
        return None if row is None else float(row[0])

    def add(self, card: Card, scores: Mapping[tuple[str, str], float]) -> None:
        """Keep scores of (picture, prompt) pairs: all of them or, if the process is killed, none."""
        rows = [(_key(card, *names), score) for names, score in scores.items() if math.isfinite(score)]
        with self._open as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)


def _key(card: Card, picture: str, prompt: str) -> bytes:
    parts = (card.fingerprint, picture, prompt if card.reads_prompt else "")
    return hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
