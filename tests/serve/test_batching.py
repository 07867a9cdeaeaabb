"""Work put together for a model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from flowalign.serve.batching import DECAY, Batcher, Full, Late, Worker


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def later(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def batcher(function: Callable[[list[int]], list[int]], **options: Any) -> Batcher[int, int]:
    return Batcher(function, Worker(), **{"size": 4, "wait": 0.05, "capacity": 100} | options)


def test_what_comes_together_goes_together_and_everyone_gets_their_own() -> None:
    calls: list[list[int]] = []
    seen: list[int] = []

    def double(items: list[int]) -> list[int]:
        calls.append(items)
        return [2 * item for item in items]

    async def work() -> None:
        made = batcher(double, seen=seen.append)
        assert await asyncio.gather(*(made.submit(item, later()) for item in range(10))) == list(range(0, 20, 2))
        assert made.waiting == 0

    run(work())
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert seen == [4, 4, 2]


def test_a_lone_item_waits_for_company_only_so_long() -> None:
    async def work() -> float:
        made, begun = batcher(lambda items: items, wait=0.1), time.perf_counter()
        await made.submit(1, later())
        return time.perf_counter() - begun

    assert 0.09 < run(work()) < 2.0


def test_only_equal_keys_share_a_call() -> None:
    calls: list[list[int]] = []

    def note(items: list[int]) -> list[int]:
        calls.append(items)
        return items

    async def work() -> None:
        made = batcher(note, key=lambda item: item % 2)
        await asyncio.gather(*(made.submit(item, later()) for item in range(6)))

    run(work())
    assert calls == [[0, 2, 4], [1, 3, 5]]


def test_the_model_is_called_by_one_thread_at_a_time() -> None:
    threads, inside, most = set(), 0, 0

    def count(items: list[int]) -> list[int]:
        nonlocal inside, most
        threads.add(threading.current_thread().name)
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return items

    async def work() -> None:
        worker = Worker()
        pair = [Batcher(count, worker, size=1, wait=0.0, capacity=9) for _ in range(2)]
        await asyncio.gather(*(made.submit(item, later()) for made in pair for item in range(5)))

    run(work())
    assert (threads, most) == ({"flowalign-model"}, 1)


def test_an_item_that_spoils_a_batch_spoils_itself() -> None:
    def picky(items: list[int]) -> list[int]:
        if 2 in items:
            raise ZeroDivisionError("two")
        return items

    async def work() -> list[Any]:
        made = batcher(picky)
        return await asyncio.gather(*(made.submit(item, later()) for item in range(4)), return_exceptions=True)

    first, second, third, fourth = run(work())
    assert (first, second, fourth) == (0, 1, 3)
    assert isinstance(third, ZeroDivisionError)


def test_the_models_own_timeout_is_not_taken_for_lateness() -> None:
    def failing(items: list[int]) -> list[int]:
        raise TimeoutError("of the model")

    async def work() -> None:
        with pytest.raises(TimeoutError, match="of the model"):
            await batcher(failing).submit(1, later())

    run(work())


@pytest.mark.parametrize("answer", [[], [1, 2]])
def test_another_number_of_results_is_an_error(answer: list[int]) -> None:
    async def work() -> None:
        with pytest.raises(ValueError, match="results for 1 items"):
            await batcher(lambda items: answer).submit(1, later())

    run(work())


def test_more_than_may_wait_is_refused() -> None:
    async def work() -> list[Any]:
        made = batcher(lambda items: items, capacity=3)
        return await asyncio.gather(*(made.submit(item, later()) for item in range(5)), return_exceptions=True)

    found = run(work())
    assert found[:3] == [0, 1, 2]
    assert all(isinstance(each, Full) for each in found[3:])


def test_what_has_no_hope_is_refused_at_once_until_the_model_is_fast_again() -> None:
    seconds = [0.2]

    def sleep(items: list[int]) -> list[int]:
        time.sleep(seconds[0])
        return items

    async def work() -> int:
        made = batcher(sleep, wait=0.0)
        with pytest.raises(Late):
            await made.submit(0, later(0.1))
        await made.submit(0, later())
        before = made.seconds
        assert before == pytest.approx(0.2, rel=0.6)
        begun, tries = time.perf_counter(), 0
        seconds[0] = 0.0
        while True:
            tries += 1
            try:
                await made.submit(1, later(0.1))
                break
            except Late:
                assert time.perf_counter() - begun < 0.05 * tries + 0.1  # at once
        assert made.seconds < before * DECAY
        return tries

    assert 2 <= run(work()) < 40


def test_the_dead_are_not_worked_on() -> None:
    calls: list[list[int]] = []
    release = threading.Event()

    def note(items: list[int]) -> list[int]:
        calls.append(items)
        release.wait(5)
        return items

    async def work() -> None:
        made = batcher(note, size=1, wait=0.0)
        first = asyncio.create_task(made.submit(0, later()))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(made.submit(1, later()))
        late = asyncio.create_task(made.submit(2, later(0.05)))
        last = asyncio.create_task(made.submit(3, later()))
        await asyncio.sleep(0.1)
        gone.cancel()
        assert isinstance((await asyncio.gather(late, return_exceptions=True))[0], Late)
        release.set()
        assert (await first, await last) == (0, 3)

    run(work())
    assert calls == [[0], [3]]
