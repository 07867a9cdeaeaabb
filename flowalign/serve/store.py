"""Pictures that are answered as an address and fetched later: in memory, bounded, for a while."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    data: bytes
    format: str
    """png, jpeg or webp."""
    until: float


class PictureStore:
    """Nothing is dropped before its time: where there is no room, a picture is not taken."""

    def __init__(self, *, size: int, count: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.count, self.seconds = size, count, seconds
        self.size = 0
        """Bytes kept."""
        self._kept: dict[str, Kept] = {}  # in order of their time
        self._clock = clock

    def __len__(self) -> int:
        return len(self._kept)

    def has_room(self, count: int) -> bool:
        """Whether so many pictures would be taken, if they are small."""
        self._expire()
        return self.size < self.limit and len(self._kept) + count <= self.count

    def put(self, data: bytes, format: str) -> str | None:
        """Keep a picture; its token, or None where there is no room. A token cannot be guessed."""
        self._expire()
        if self.size + len(data) > self.limit or len(self._kept) >= self.count:
            return None
        token = secrets.token_urlsafe(24)
        self._kept[token] = Kept(data, format, self._clock() + self.seconds)
        self.size += len(data)
        return token

    def get(self, token: str) -> Kept | None:
        self._expire()
        return self._kept.get(token)

    def wait(self) -> float:
        """Seconds until something is dropped; 0 where nothing is kept."""
        self._expire()
        return max(0.0, next(iter(self._kept.values())).until - self._clock()) if self._kept else 0.0

    def _expire(self) -> None:
        now = self._clock()
        while self._kept:
            token, oldest = next(iter(self._kept.items()))
            if oldest.until > now:
                return
            del self._kept[token]
            self.size -= len(oldest.data)
