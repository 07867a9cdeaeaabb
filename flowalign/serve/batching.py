"""Work for a model, put together across requests: one thread calls it, and nobody waits longer than they can."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

DECAY = 0.9
"""An estimate that turns work away shrinks by this much each time, so that a model that became fast again is found out."""


class Late(Exception):
    """It would not be, or was not, done in time."""


class Full(Exception):
    """More waits than may."""


class Worker:
    """One thread for all models. It dies with the process, so that a model that hangs does not keep a server from ending."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="flowalign-model", daemon=True)
            self._thread.start()
        future: Future[Result] = Future()
        self._calls.put((function, future))
        return future

    def _work(self) -> None:
        while True:
            function, future = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # whatever a model raises belongs to who asked, not to this thread
                    future.set_exception(error)
            del function, future  # or they, and the pictures in them, live until the next call


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    item: Item
    deadline: float
    arrived: float
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Collects items of one event loop and gives them to a model, at most `size` with equal `key` at a time.

    run: items -> as many results, on the worker's thread. An item that spoils a batch spoils itself only: where a batch of
    several fails, each is tried alone.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        worker: Worker,
        *,
        size: int,
        wait: float,
        capacity: int,
        key: Callable[[Item], Hashable] = lambda item: None,
        seen: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._run, self._worker, self._key, self._seen = run, worker, key, seen
        self.size, self.wait, self.capacity = size, wait, capacity
        self.seconds = 0.0
        """Estimated seconds of one item."""
        self._pending: list[_Job[Item, Result]] = []
        self._task: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self._busy_with = 0
        self._more = asyncio.Event()

    @property
    def waiting(self) -> int:
        return len(self._pending)

    async def submit(self, item: Item, deadline: float) -> Result:
        """The result of one item by `deadline`, in the event loop's time.

        Raises Late, at once where the work ahead leaves no hope; Full; and whatever `run` raised.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if len(self._pending) >= self.capacity:
            raise Full
        if now + self._expected(now) > deadline:
            self.seconds *= DECAY
            raise Late
        job = _Job(item, deadline, now, loop.create_future())
        self._pending.append(job)
        self._more.set()
        if self._task is None:
            self._task = loop.create_task(self._drain())
        try:
            async with asyncio.timeout_at(deadline):
                return await job.future
        except TimeoutError:
            if job.future.done() and not job.future.cancelled() and job.future.exception() is not None:
                raise  # the model's own
            raise Late from None
        finally:
            job.future.cancel()
            if job in self._pending:
                self._pending.remove(job)

    def _expected(self, now: float) -> float:
        """Seconds until one more item would be done, as far as one can tell; 0 before the first is."""
        running = 0.0
        if self._busy_since is not None:
            spent, usual = now - self._busy_since, self._busy_with * self.seconds
            running = max(usual - spent, spent - usual)  # one that takes longer than usual is feared to take as long again
        return running + (len(self._pending) + 1) * self.seconds

    async def _drain(self) -> None:
        """Work until nothing is left."""
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                await self._company()
                batch = self._take(loop.time())
                if batch:
                    await self._work(batch)
        finally:
            self._task = None

    async def _company(self) -> None:
        """Wait until a batch is full or its first item has waited long enough."""
        if not self._pending:
            return
        until = self._pending[0].arrived + self.wait
        try:
            async with asyncio.timeout_at(until):
                while len(self._pending) < self.size:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            pass

    def _take(self, now: float) -> list[_Job[Item, Result]]:
        alive = [job for job in self._pending if not job.future.done() and job.deadline > now]
        batch = [job for job in alive if self._key(job.item) == self._key(alive[0].item)][: self.size] if alive else []
        taken = {id(job) for job in batch}
        self._pending = [job for job in alive if id(job) not in taken]
        return batch

    async def _work(self, batch: list[_Job[Item, Result]]) -> None:
        items, deadlines = [job.item for job in batch], [job.deadline for job in batch]
        loop = asyncio.get_running_loop()
        self._busy_since, self._busy_with = loop.time(), len(batch)
        self._seen(len(batch))
        try:
            results = await asyncio.wrap_future(self._worker.call(lambda: self._results(items, deadlines)))
        finally:
            spent = (loop.time() - self._busy_since) / len(batch)
            self.seconds = spent if self.seconds == 0 else self.seconds + 0.3 * (spent - self.seconds)
            self._busy_since, self._busy_with = None, 0
        for job, result in zip(batch, results, strict=True):
            if job.future.done():
                continue
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    def _results(self, items: list[Item], deadlines: list[float]) -> list[Result | Exception]:
        """On the worker's thread: a result or an error for each item."""
        try:
            return list(self._checked(items))
        except Exception as error:
            if len(items) == 1:
                return [error]
        out: list[Result | Exception] = []
        for item, deadline in zip(items, deadlines, strict=True):
            if time.monotonic() >= deadline:  # the clock of the event loop
                out.append(Late())
                continue
            try:
                out.extend(self._checked([item]))
            except Exception as error:
                out.append(error)
        return out

    def _checked(self, items: list[Item]) -> Sequence[Result]:
        results = self._run(items)
        if len(results) != len(items):
            raise ValueError(f"the model gave {len(results)} results for {len(items)} items")
        return results
