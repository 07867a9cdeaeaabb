"""`flowalign score` as a user runs it, with the rewards of the embedded world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flowalign import cli, runs
from flowalign.data.images import decode
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf
from flowalign.scoring.sources import open_items
from flowalign.scoring.table import read_table
from tests.scoring.pixels import encoded

EMOJI = Path(__file__).resolve().parents[2] / "samples" / "emoji"
REWARDS = str(EMOJI / "rewards.yaml")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `generate` writes, four pictures of emoji."""
    data = pq.read_table(EMOJI / "emoji.parquet").slice(0, 4)
    column = next(name for name in data.column_names if not pa.types.is_string(data.schema.field(name).type))
    place = tmp_path / "drawn"
    place.mkdir()
    lines = []
    for number, cell in enumerate(data.column(column).to_pylist()):
        picture = decode(cell["bytes"] if isinstance(cell, dict) else cell)
        (place / f"{number:05d}-0.png").write_bytes(encoded(picture))
        lines.append({"file_name": f"{number:05d}-0.png", "prompt": f"thing {number}", "seed": number, "generator": "tiny"})
    (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, Any]:
    """Exit code, what people read, and the result."""
    code = cli.main(["score", *map(str, argv), "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    return code, err, json.loads(out.splitlines()[-1])


def test_from_a_folder_to_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.parquet"
    code, said, result = command(capsys, folder, "--rewards", REWARDS, "--out", out, "--batch-size", 2)
    assert code == 0
    table = read_table(out)
    rewards = load_rewards([REWARDS], Shelf(torch.device("cpu")))
    pictures = [decode((folder / f"{number:05d}-0.png").read_bytes()) for number in range(4)]
    for reward in rewards:
        wanted = reward.score(pictures, [f"thing {number}" for number in range(4)]).double().numpy()
        assert table.raw(reward.card.name) == pytest.approx(wanted, abs=1e-4)
        figures = result["rewards"][reward.card.name]
        assert (figures["n"], figures["failed"]) == (4, 0)
        for name, value in (("mean", wanted.mean()), ("sd", wanted.std()), ("min", wanted.min()), ("max", wanted.max())):
            assert figures[name] == pytest.approx(value, abs=1e-4)
        assert figures["median"] == pytest.approx(np.median(wanted), abs=1e-4)
    assert table.data.column("seed").to_pylist() == [0, 1, 2, 3]
    assert set(table.texts("generator")) == {"tiny"}
    assert table.texts("path") == [str(folder / f"{number:05d}-0.png") for number in range(4)]
    lines = said.splitlines()
    (head,) = (line for line in lines if line.startswith("reward"))
    assert head.split() == ["reward", "better", "n", "failed", "mean", "sd", "min", "median", "max"]
    assert any(line.split()[:4] == ["emoji_clip", "higher", "4", "0"] for line in lines)
    assert any(str(out) in line for line in lines)
    assert any("4 pictures in" in line and "a second" in line for line in lines)
    assert result["pictures_per_second"] == pytest.approx(4 / result["seconds"])
    code, said, result = command(capsys, folder, "--rewards", REWARDS, "--out", tmp_path / "again.parquet")
    assert (code, result["forwards"], result["cached"]) == (0, 0, 8)
    assert "8 scores were known" in said
    assert read_table(tmp_path / "again.parquet").data.equals(table.data)


def test_what_fails_is_counted_and_told_and_the_rest_is_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "00002-0.png").write_bytes(b"no picture")
    code, said, result = command(capsys, folder, "--rewards", REWARDS, "--out", tmp_path / "t.parquet")
    assert (code, result["rows"], result["scored"], result["failed"]) == (0, 4, 3, 1)
    assert "1 of them lack" in said
    assert f"{folder / '00002-0.png'}: 10 bytes are not a readable picture" in said
    assert [why is None for why in read_table(tmp_path / "t.parquet").texts("why.style")] == [True, True, False, True]


def test_pictures_without_prompts_are_scored_by_what_reads_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "metadata.jsonl").unlink()
    code, said, result = command(capsys, folder, "--rewards", REWARDS, "--out", tmp_path / "t.parquet")
    assert code == 0
    assert (result["rewards"]["style"]["n"], result["rewards"]["emoji_clip"]["n"]) == (4, 0)
    assert "emoji_clip: the picture has no prompt; give one beside it, in a column, or for all with --prompt" in said
    code, _, result = command(capsys, folder, "--rewards", REWARDS, "--out", tmp_path / "t.parquet", "--prompt", "a face")
    assert (code, result["rewards"]["emoji_clip"]["n"], result["rewards"]["style"]["n"]) == (0, 4, 4)
    assert result["cached"] == 4  # style's
    assert set(read_table(tmp_path / "t.parquet").texts("prompt")) == {"a face"}


def test_odd_prompts_are_scored_by_a_real_tower(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["word " * 3000, "\U0001f600\U0001f3fd \U0001f468‍\U0001f469‍\U0001f467", "‏صورة ثعلب أحمر", "half \ud83d"]
    rows = [{"file_name": f"{number:05d}-0.png", "prompt": prompt} for number, prompt in enumerate(prompts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, said, result = command(capsys, folder, "--rewards", REWARDS, "--out", tmp_path / "t.parquet", "--batch-size", 4)
    assert (code, result["rewards"]["emoji_clip"]["n"], result["rewards"]["style"]["n"]) == (0, 3, 4)
    assert "is not Unicode text" in said
    assert len({*read_table(tmp_path / "t.parquet").raw("emoji_clip")[:3]}) == 3


def test_nothing_scored_is_a_failure(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        (folder / f"{number:05d}-0.png").write_bytes(b"no picture")
    code, said, result = command(capsys, folder, "--rewards", REWARDS, "--out", tmp_path / "t.parquet")
    assert code == 1
    assert "none of the 4 pictures of" in result["error"]["message"]
    assert "not a readable picture" in result["error"]["message"]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--out", "t.csv"], "give a file's name that ends with .parquet"),
        (["--out", "{folder}/00000-0.png/t.parquet"], "where nothing can be written"),
        (["--image-column", "nothing"], "has no column 'nothing'"),
        (["--cache", "{folder}/00000-0.png"], "is not a cache of scores"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    given = [each.format(folder=folder) for each in argv]
    out = [] if "--out" in given else ["--out", tmp_path / "t.parquet"]
    code, _, result = command(capsys, folder, "--rewards", REWARDS, *given, *out)
    assert code == 2
    assert said in result["error"]["message"]
    assert "\n" not in result["error"]["message"]
    assert not (tmp_path / "t.parquet").exists()


def test_the_limit_is_the_first_rows(folder: Path, tmp_path: Path) -> None:
    result = runs.score(str(folder), [REWARDS], out=tmp_path / "t.parquet", limit=2, device="cpu", progress=False)
    assert result["rows"] == len(read_table(tmp_path / "t.parquet")) == 2


def test_a_table_of_scores_is_scored_by_others(folder: Path, tmp_path: Path) -> None:
    """Also where it lies among its pictures, which stay a folder of pictures."""
    (folder / "metadata.jsonl").unlink()
    out = folder / "scores.parquet"
    for _ in range(2):
        result = runs.score(str(folder), [REWARDS], out=out, prompt="a face", device="cpu", progress=False)
        assert (result["rows"], result["failed"]) == (4, 0)
    items = open_items(out)
    assert [items.item(place).prompt for place in range(len(items))] == ["a face"] * 4
    more = runs.score(str(out), [REWARDS], out=tmp_path / "more.parquet", device="cpu", progress=False)
    assert (more["failed"], more["forwards"]) == (0, 0)
    assert read_table(tmp_path / "more.parquet").data.equals(read_table(out).data)


def test_what_is_scored_is_not_written_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """scores.parquet is also what --out is unless told otherwise; it may be named in another way."""
    monkeypatch.chdir(tmp_path)
    assert command(capsys, folder, "--rewards", REWARDS)[0] == 0
    before = Path("scores.parquet").read_bytes()
    Path("link.parquet").symlink_to("scores.parquet")
    for source in ("scores.parquet", tmp_path / "scores.parquet", "link.parquet"):
        code, _, result = command(capsys, source, "--rewards", "jpeg_size")
        assert code == 2
        assert "give another file, such as --out scores-new.parquet" in result["error"]["message"]
        assert Path("scores.parquet").read_bytes() == before
    assert command(capsys, "scores.parquet", "--rewards", "jpeg_size", "--out", "scores-new.parquet")[0] == 0


def test_interrupted_it_says_how_to_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hand:
        """Presses Ctrl-C while the second batch is written."""

        left = 1

    add = ScoreCache.add

    def interrupted(cache: ScoreCache, given: Any) -> Any:
        Hand.left -= 1
        if Hand.left < 0:
            raise KeyboardInterrupt
        return add(cache, given)

    out = tmp_path / "t.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(ScoreCache, "add", interrupted)
        code, _, result = command(capsys, folder, "--rewards", REWARDS, "--out", out, "--batch-size", 2)
    assert code == 1
    assert result["error"]["message"] == "interrupted; what was scored is kept, so the same command goes on from there."
    assert not list(tmp_path.glob("*t.parquet*"))
    code, _, result = command(capsys, folder, "--rewards", REWARDS, "--out", out, "--batch-size", 2)
    assert (code, result["forwards"], result["cached"]) == (0, 2, 4)
