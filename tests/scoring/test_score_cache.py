"""The cache of scores: what is in it stays, whoever else writes and whatever is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from flowalign.errors import DataError, RunError
from flowalign.scoring.cache import FILE, ScoreCache
from flowalign.scoring.rewards.base import Card
from tests.scoring.pixels import card

ROOT = Path(__file__).resolve().parents[2]
PLAIN, TOLD = card("a", reads_prompt=False), card("b", reads_prompt=True)


def found(cache: ScoreCache, reward: Card, picture: str, prompt: str) -> float | None:
    return cache.find([reward], picture, prompt).get(reward.name)


def test_what_changes_a_score_is_part_of_what_it_is_known_by(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.add([(PLAIN, {("picture", "one"): 1.0}), (TOLD, {("picture", "one"): 2.0, ("other", "one"): float("nan")})])
    assert found(cache, PLAIN, "picture", "two") == 1.0
    assert found(cache, TOLD, "picture", "one") == 2.0
    assert found(cache, TOLD, "picture", "two") is None
    assert found(cache, TOLD, "other", "one") is None  # a failure is not kept
    assert found(cache, card("b", reads_prompt=True, fingerprint="b-2"), "picture", "one") is None
    assert found(cache, card("c", reads_prompt=True, fingerprint="b-1"), "picture", "one") == 2.0  # whatever its column's name
    assert found(ScoreCache(tmp_path), PLAIN, "picture", "") == 1.0
    assert cache.find([PLAIN, TOLD], "picture", "one") == {"a": 1.0, "b": 2.0}


def test_of_two_that_score_the_same_the_first_is_believed(tmp_path: Path) -> None:
    one, other = ScoreCache(tmp_path), ScoreCache(tmp_path)
    assert one.add([(TOLD, {("p", "x"): 1.0, ("q", "x"): 3.0})]) == [{("p", "x"): 1.0, ("q", "x"): 3.0}]
    assert other.add([(TOLD, {("p", "x"): 1.5, ("r", "x"): 4.0})]) == [{("p", "x"): 1.0, ("r", "x"): 4.0}]
    assert found(one, TOLD, "r", "x") == 4.0


def test_what_failed_in_a_batch_is_remembered_by_reward(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.set_apart([TOLD], [("p", "x"), ("q", "x")])
    cache.set_apart([TOLD], [("q", "x")])
    again = ScoreCache(tmp_path)
    assert again.is_apart([TOLD], "p", "x")
    assert again.is_apart([TOLD], "q", "x")
    assert not again.is_apart([TOLD], "p", "y")
    assert not again.is_apart([PLAIN], "p", "x")
    assert not again.is_apart([PLAIN, TOLD], "p", "x")  # all of them, or it is not
    assert found(again, TOLD, "p", "x") is None


def test_all_scores_of_a_batch_are_kept_or_none(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    with pytest.raises(RunError, match="can no longer be used"):  # the second reward's score is nothing SQLite takes
        cache.add([(PLAIN, {("p", "x"): 1.0}), (TOLD, {("p", "x"): Decimal(2)})])  # type: ignore[dict-item]
    assert found(cache, PLAIN, "p", "x") is None
    cache.add([(PLAIN, {("p", "x"): 1.0})])  # and it goes on
    assert found(cache, PLAIN, "p", "x") == 1.0


def test_a_file_that_is_no_cache_is_said(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("something else that is long enough to be looked at by a database " * 20)
    with pytest.raises(DataError, match=r"is not a cache of scores .*--cache"):
        ScoreCache(tmp_path)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"is not a cache of scores .*--cache"):
        ScoreCache(tmp_path / "file")


def test_a_cache_that_breaks_on_the_way_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("DROP TABLE scores")
    for ask in (lambda: found(cache, PLAIN, "p", "x"), lambda: cache.add([(PLAIN, {("p", "x"): 1.0})])):
        with pytest.raises(RunError, match=r"can no longer be used .*run the same again") as error:
            ask()
        assert "\n" not in str(error.value)


WRITER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from flowalign.scoring.cache import ScoreCache
from tests.scoring.pixels import card
sys.stdin.readline()
cache = ScoreCache(Path({folder!r}))
rewards = card("a", reads_prompt=False), card("b", reads_prompt=True)
for number in range({count}):
    names = [(str(number * 8 + each), "x") for each in range(8)]
    cache.add([(reward, {{name: {value} + place for name in names}}) for place, reward in enumerate(rewards)])
    print(number, flush=True)
"""


def writer(folder: Path, value: float, count: int) -> subprocess.Popen[str]:
    program = WRITER.format(root=str(ROOT), folder=str(folder), value=value, count=count)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_processes_open_and_fill_one_cache_at_once_and_one_is_killed(tmp_path: Path) -> None:
    folder, count = tmp_path / "c", 40
    killed, *others = processes = [writer(folder, value, n) for value, n in ((0.0, 10**6), (10.0, count), (20.0, count))]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")  # all of them make the file, at the same moment
        process.stdin.flush()
    assert killed.stdout is not None
    told = [int(killed.stdout.readline()) for _ in range(30)]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    told += [int(line) for line in killed.stdout.read().split()]
    for process in others:
        process.communicate()
        assert process.returncode == 0
    cache = ScoreCache(folder)
    assert sqlite3.connect(folder / FILE).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for number in range(max(count, len(told))):
        both = [[found(cache, reward, str(number * 8 + each), "x") for each in range(8)] for reward in (PLAIN, TOLD)]
        assert len({*both[0]}) == 1  # a batch is one writer's
        assert both[0][0] in (0.0, 10.0, 20.0)
        assert both[1] == [value + 1 for value in both[0]]  # type: ignore[operator]
