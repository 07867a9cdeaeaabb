"""The engine: every picture is scored once, whatever the batch, the order and the kills; a failure is never a number."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.errors import RunError
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import AHEAD, EARLY, Scorer, score
from flowalign.scoring.scored import Counts
from flowalign.scoring.sources import open_items
from flowalign.scoring.table import ScoreTable, read_table
from tests.scoring.pixels import Brightness, Lettered, Means, folder_of, picture

ROOT = Path(__file__).resolve().parents[2]


def run(source: Path, out: Path, cache: Path, *, batch_size: int = 4, workers: int = 2) -> tuple[ScoreTable, Counts, Means]:
    tower = Means()
    scorer = Scorer([Brightness(tower), Lettered(tower)], ScoreCache(cache), batch_size=batch_size, workers=workers)
    counts = score(open_items(source), scorer, out, progress=False)
    return read_table(out), counts, tower


def brightness(number: int) -> float:
    return sum(picture(number).getpixel((0, 0))) / 3 / 255  # type: ignore[arg-type]


def test_scores_are_the_formulas_in_the_order_of_the_source(tmp_path: Path) -> None:
    table, counts, tower = run(folder_of(tmp_path / "p", 11), tmp_path / "t.parquet", tmp_path / "c")
    assert table.raw("brightness").tolist() == pytest.approx([brightness(n) for n in range(11)], abs=1e-6)
    assert table.raw("lettered").tolist() == pytest.approx([brightness(n) + len(f"thing {n}") for n in range(11)], abs=1e-5)
    assert table.texts("prompt") == [f"thing {n}" for n in range(11)]
    assert (counts.rows, counts.scored, counts.failed, counts.forwards, counts.cached) == (11, 11, 0, 11, 0)
    assert len(tower.seen) == 11  # two rewards, one forward


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (64, 4)])
def test_batches_and_threads_change_nothing(tmp_path: Path, batch_size: int, workers: int) -> None:
    source = folder_of(tmp_path / "p", 10)
    one, _, _ = run(source, tmp_path / "a.parquet", tmp_path / "a")
    other, _, _ = run(source, tmp_path / "b.parquet", tmp_path / "b", batch_size=batch_size, workers=workers)
    assert one.data.equals(other.data)
    assert one.cards == other.cards


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 9)
    first, _, _ = run(source, tmp_path / "t.parquet", tmp_path / "c")
    again, counts, tower = run(source, tmp_path / "again.parquet", tmp_path / "c")
    assert (counts.forwards, counts.cached, tower.seen) == (0, 18, [])
    assert first.data.equals(again.data)
    folder_of(source, 12)
    _, counts, tower = run(source, tmp_path / "more.parquet", tmp_path / "c")
    assert (counts.rows, counts.forwards) == (12, 3)
    assert len(tower.seen) == 3


def test_the_same_picture_and_prompt_are_scored_once_in_one_run(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 3)
    for copy in range(8):
        (source / f"copy{copy}.png").write_bytes((source / "0001.png").read_bytes())
        (source / f"copy{copy}.txt").write_text("thing 1")
    table, counts, _ = run(source, tmp_path / "t.parquet", tmp_path / "c", batch_size=4)
    assert counts.forwards == 3
    assert len({*table.raw("lettered")[[1, *range(3, 11)]]}) == 1


def test_one_bad_picture_costs_no_other_its_score(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 8)
    for number, prompt in ((2, "do fail here"), (5, "nan it is")):
        (source / f"{number:04d}.txt").write_text(prompt)
    table, counts, _ = run(source, tmp_path / "t.parquet", tmp_path / "c", batch_size=8)
    assert counts.failed == 2
    assert [n for n, value in enumerate(table.raw("lettered")) if value != value] == [2, 5]
    assert table.raw("brightness").tolist() == pytest.approx([brightness(n) for n in range(8)], abs=1e-6)
    why = table.texts("why.lettered")
    assert why[2] == "ValueError: the text tower tripped"
    assert "lettered is nan for the prompt 'nan it is'" in str(why[5])
    assert [why[n] for n in (0, 1, 3, 4, 6, 7)] == [None] * 6
    assert counts.problems[0].endswith("0002.png: lettered: ValueError: the text tower tripped")


def test_a_batch_that_does_not_fit_into_memory_is_halved(tmp_path: Path) -> None:
    class Small(Means):
        def see(self, inputs: Sequence[Tensor]) -> Tensor:
            sizes.append(len(inputs))
            if len(inputs) > 3:
                raise torch.OutOfMemoryError("too much")
            return super().see(inputs)

    sizes: list[int] = []
    cache = ScoreCache(tmp_path / "c")
    scorer = Scorer([Brightness(Small())], cache, batch_size=8)
    counts = score(open_items(folder_of(tmp_path / "p", 8, None)), scorer, tmp_path / "t.parquet", progress=False)
    assert (counts.scored, counts.failed, sizes) == (8, 0, [8, 4, 2, 2, 4, 2, 2])
    assert read_table(tmp_path / "t.parquet").raw("brightness").tolist() == pytest.approx([brightness(n) for n in range(8)])


@pytest.mark.parametrize(("room", "most"), [(2, 8), (8, 2)])
def test_nothing_of_a_batch_is_held_while_its_halves_are_tried(tmp_path: Path, room: int, most: int) -> None:
    """The tower has room for the features of so many pictures in all, and the head judges so many at a time."""

    class Crowded(Means):
        def see(self, inputs: Sequence[Tensor]) -> Tensor:
            features = super().see(inputs)
            live.append(len(inputs))
            weakref.finalize(features, live.remove, len(inputs))
            if sum(live) > room:
                raise torch.OutOfMemoryError("too much")
            return features

    class Heavy(Brightness):
        def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
            if len(prompts) > most:
                raise torch.OutOfMemoryError("too much")
            return super().judge(features, prompts)

    live: list[int] = []
    scorer = Scorer([Heavy(Crowded())], ScoreCache(tmp_path / "c"), batch_size=8)
    counts = score(open_items(folder_of(tmp_path / "p", 8, None)), scorer, tmp_path / "t.parquet", progress=False)
    assert (counts.scored, counts.failed) == (8, 0)


def test_one_picture_under_several_prompts_is_seen_once_by_what_reads_none(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 1, None)
    lines = [json.dumps({"file_name": "0000.png", "prompt": f"prompt {number}"}) for number in range(6)]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    tower, other = Means("one"), Means("other")
    scorer = Scorer([Brightness(tower), Lettered(other)], ScoreCache(tmp_path / "c"), batch_size=4)
    score(open_items(source), scorer, tmp_path / "t.parquet", progress=False)
    assert (len(tower.seen), len(other.seen)) == (1, 6)


def test_a_cache_that_breaks_on_the_way_ends_the_run(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "c")

    class Breaking(Means):
        def see(self, inputs: Sequence[Tensor]) -> Tensor:
            with sqlite3.connect(cache.path) as connection:
                connection.execute("DROP TABLE IF EXISTS scores")
            return super().see(inputs)

    with pytest.raises(RunError, match="can no longer be used"):
        score(
            open_items(folder_of(tmp_path / "p", 8)),
            Scorer([Brightness(Breaking())], cache, batch_size=4),
            tmp_path / "t.parquet",
            progress=False,
        )
    assert not (tmp_path / "t.parquet").exists()


def test_rewards_that_read_no_prompt_need_none(tmp_path: Path) -> None:
    table, counts, _ = run(folder_of(tmp_path / "p", 3, None), tmp_path / "t.parquet", tmp_path / "c")
    assert (counts.scored, counts.failed) == (3, 3)
    assert table.raw("brightness").tolist() == pytest.approx([brightness(n) for n in range(3)], abs=1e-6)
    assert {*table.texts("why.lettered")} == {
        "the picture has no prompt; give one beside it, in a column, or for all with --prompt"
    }


def test_a_reward_that_scores_nothing_is_told_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = Means()
    scorer = Scorer([Brightness(tower), Lettered(tower)], ScoreCache(tmp_path / "c"))
    said = []
    for count in (EARLY - 1, EARLY):
        score(open_items(folder_of(tmp_path / "p", count, "always fail")), scorer, tmp_path / "t.parquet")
        said.append(capsys.readouterr().err)
    assert "has scored none" not in said[0]
    assert f"lettered has scored none of the first {EARLY} pictures: ValueError: the text tower tripped" in said[1]
    assert "brightness has scored none" not in said[1]


def test_only_a_few_pictures_are_held_at_a_time(tmp_path: Path) -> None:
    alive = most = 0

    class Held:
        def __init__(self, value: object) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            self.value = value

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Watched(Means):
        def prepare(self, image):  # type: ignore[no-untyped-def]
            return Held(super().prepare(image))

        def see(self, inputs):  # type: ignore[no-untyped-def]
            return super().see([each.value for each in inputs])

    tower = Watched()
    scorer = Scorer([Brightness(tower)], ScoreCache(tmp_path / "c"), batch_size=4, workers=2)
    score(open_items(folder_of(tmp_path / "p", 120, None)), scorer, tmp_path / "t.parquet", progress=False)
    assert len(tower.seen) == 120
    assert most <= (AHEAD + 2) * 4


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.scoring.pixels import Brightness, Lettered, Means
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import Scorer, score
from flowalign.scoring.sources import open_items

class Slow(Means):
    def see(self, inputs):
        print(len(inputs), flush=True)
        time.sleep({wait})
        return super().see(inputs)

tower = Slow()
scorer = Scorer([Brightness(tower), Lettered(tower)], ScoreCache(Path({cache!r})), batch_size=4)
score(open_items({source!r}), scorer, Path({out!r}), progress=False)
"""


def test_killed_and_run_again_it_ends_with_the_same_table_and_no_picture_scored_twice(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 60)
    whole, _, _ = run(source, tmp_path / "whole.parquet", tmp_path / "other")
    out, seen = tmp_path / "t.parquet", 0
    words = dict(root=str(ROOT), cache=str(tmp_path / "c"), source=str(source), out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(wait=0.05, **words)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    while seen < 24:
        seen += int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen += sum(int(line) for line in process.stdout.read().split())
    assert not out.exists()
    table, counts, tower = run(source, out, tmp_path / "c")
    assert table.data.equals(whole.data)
    assert 60 <= seen + len(tower.seen) <= 60 + 4  # at most the batch in flight goes through twice
    assert counts.forwards == len(tower.seen) < 60


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "p", 40)
    words = dict(root=str(ROOT), cache=str(tmp_path / "c"), source=str(source))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    programs = [SLOW.format(wait=0.02, out=str(tmp_path / f"{n}.parquet"), **words) for n in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", each], stdout=subprocess.DEVNULL, env=environment) for each in programs
    ]
    assert [process.wait() for process in processes] == [0, 0]
    first, second = (read_table(tmp_path / f"{n}.parquet") for n in range(2))
    assert first.data.equals(second.data)


def test_the_table_says_what_its_columns_are(tmp_path: Path) -> None:
    table, _, _ = run(folder_of(tmp_path / "p", 2), tmp_path / "t.parquet", tmp_path / "c")
    assert table.rewards == ("brightness", "lettered")
    assert table.cards["lettered"].fingerprint == "lettered-1"
    import pyarrow.parquet as pq

    about = json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[b"flowalign"])
    assert about["version"] == 1
