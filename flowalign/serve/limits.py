"""How much a server takes on: sizes, counts and times, and the gate that holds requests back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields

from flowalign.errors import ConfigError
from flowalign.serve.problems import Problem

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Every limit of a server. Raises ConfigError for one that is not above 0 (`queue` and `batch_wait` may be 0)."""

    body: int = MIB
    """Bytes of a request for pictures."""
    score_body: int = 64 * MIB
    """Bytes of a request for scores."""
    answer: int = 128 * MIB
    """Bytes of an upstream's answer."""
    picture: int = 32 * MIB
    """Bytes of one encoded picture."""
    pixels: int = 4096 * 4096
    """Width x height of a picture that is drawn, scored or moved."""
    n: int = 10
    """Pictures of one request."""
    scored: int = 64
    """Pictures of one request for scores."""
    prompt: int = 32_000
    """Characters."""
    concurrency: int = 32
    """Requests worked on at once."""
    queue: int = 64
    """Requests that wait for that."""
    queue_timeout: float = 60.0
    """Seconds that a request waits at most."""
    connections: int = 512
    header_timeout: float = 30.0
    """Seconds a caller has for a request's headers."""
    body_timeout: float = 60.0
    """Seconds a caller has for a request's body."""
    send_timeout: float = 60.0
    """Seconds without progress after which a caller who does not read is cut off."""
    connect_timeout: float = 10.0
    upstream_timeout: float = 300.0
    """Seconds an upstream has for its whole answer."""
    fetch_timeout: float = 30.0
    """Seconds for one picture that an upstream answers as an address."""
    flow_timeout: float = 30.0
    """Seconds a flow has after the upstream's answer, fetching and encoding included."""
    generate_timeout: float = 600.0
    """Seconds a generator, or rewards, have for a request."""
    drain_timeout: float = 60.0
    """Seconds that requests in work have once the server was told to stop."""
    batch: int = 8
    """Pictures that one call of a model takes."""
    batch_wait: float = 0.005
    """Seconds that a picture waits for company."""
    batch_queue: int = 256
    """Pictures that wait for a model."""
    stored: int = 256 * MIB
    """Bytes of pictures kept to be fetched by their address."""
    stored_count: int = 1024
    stored_seconds: float = 3600.0
    """Seconds that a picture is kept."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            lowest_is_zero = each.name in ("queue", "batch_wait")
            if not math.isfinite(value) or value < 0 or (value == 0 and not lowest_is_zero):
                allowed = "0 or more" if lowest_is_zero else "a number above 0"
                raise ConfigError(f"the limit {each.name} is {value}; give {allowed}.")


class Gate:
    """Lets a bounded number of requests work, a bounded number wait in turn, and sends the others away."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.working = self.waiting = 0
        self._places = asyncio.Semaphore(limits.concurrency)
        self._clock = clock
        self._seconds = 1.0  # of a request, a moving mean

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place to work in. Raises Problem (503, with Retry-After) where the queue is full or the wait too long."""
        if self._places.locked() and self.waiting >= self.limits.queue:
            raise self._busy("the queue is full")
        self.waiting += 1
        try:
            async with asyncio.timeout(self.limits.queue_timeout):
                await self._places.acquire()
        except TimeoutError:
            raise self._busy(f"no place became free in {self.limits.queue_timeout:g} s") from None
        finally:
            self.waiting -= 1
        self.working += 1
        started = self._clock()
        try:
            yield
        finally:
            self.working -= 1
            self._places.release()
            self._seconds += 0.2 * (self._clock() - started - self._seconds)

    def _busy(self, why: str) -> Problem:
        ahead = self._seconds * (self.waiting + 1) / self.limits.concurrency
        return Problem(
            503,
            f"The server is busy: {why}.",
            code="server_busy",
            headers={"retry-after": str(min(60, max(1, math.ceil(ahead))))},
        )
