"""Where commands write: never over what they read, and where it cannot be is said before anything is loaded or computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowalign import cli
from flowalign.data.writer import write_comparisons
from tests.scoring.tables import table_of


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with something of everything that is read, which is where commands run."""
    table = table_of(["a", "a", "b", "b"], {"style": [0.1, 0.7, 0.2, 0.9]})
    for name in ("scores.parquet", "base.parquet"):
        table.write(tmp_path / name)
    row = {"prompt": "a", "images": ["/p/1.png", "/p/0.png"], "num_chosen": 1}
    write_comparisons(tmp_path / "pairs.jsonl", [row])
    for name in ("votes.json", "plan.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def left(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def said(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command ends for bad input."""
    assert cli.main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "command",
    [
        "audit pairs.jsonl --write-filtered pairs.jsonl",
        "audit pairs.jsonl --against votes.json --write-filtered link.jsonl",
        "audit folder --against pairs.jsonl --write-filtered pairs.jsonl",
        "calibrate scores.parquet --base base.parquet --out base.parquet",
        "calibrate scores.parquet --out scores.parquet",
        "calibrate scores.parquet --pairs votes.json --out votes.json",
        "calibrate scores.parquet --pairs votes.json --out votes.parquet",
        "select scores.parquet --by steered --plan plan.jsonl --out plan.jsonl",
        "select pairs.jsonl --by explicit --out pairs.jsonl",
        "margins no-such-checkpoint pairs.jsonl --out pairs.jsonl",
    ],
)
def test_what_is_read_is_not_written_over(files: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "link.jsonl").symlink_to(files / "votes.json")
    before = left(files)
    assert "which is what is read and would be lost" in said(command, capsys)
    assert left(files) == before


def test_a_calibration_that_is_applied_is_not_written_over(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "scores.parquet", "--out", "one.json"]) == 0
    before = left(files)
    capsys.readouterr()
    assert "give the new table" in said("calibrate base.parquet --apply one.json --out one.json", capsys)
    assert left(files) == before
    assert cli.main(["calibrate", "base.parquet", "--apply", "one.json", "--out", "one.parquet"]) == 0
    assert (files / "one.json").read_bytes() == before["one.json"]


@pytest.mark.parametrize(
    "command",
    [
        "generate no-such-checkpoint --prompts a --out {place}",
        "evaluate no-such-checkpoint no-such-run --prompts a --out {place}",
        "flow apply no-such-run folder --out {place}",
        "flow evaluate no-such-run folder --out {place}",
        "audit pairs.jsonl --out {place}",
        "demo --out {place}",
        "demo flow --out {place}",
        "merge one two --out {place}",
    ],
)
def test_a_folder_cannot_be_where_a_file_is(
    files: Path, root: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.startswith("demo"):
        monkeypatch.chdir(root)
    before = left(files)
    assert f"out is {files / 'file'}, which is a file; give a folder" in said(command.format(place=files / "file"), capsys)
    within = files / "file" / "within"
    assert f"out is {within}, where nothing can be written (Not a directory)" in said(command.format(place=within), capsys)
    assert left(files) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("select scores.parquet --by best_worst --out {place}", "place.jsonl"),
        ("margins no-such-checkpoint pairs.jsonl --out {place}", "place.jsonl"),
        ("calibrate scores.parquet --out {place}", "place.parquet"),
        ("calibrate scores.parquet --out {place}", "place.json"),
        ("audit pairs.jsonl --write-filtered {place}", "place.jsonl"),
        ("export run --out {place}", "place.safetensors"),
    ],
)
def test_a_file_cannot_be_where_a_folder_is(files: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (files / name).mkdir()
    (files / "run" / "weights").mkdir(parents=True)
    (files / "run" / "weights" / "pytorch_lora_weights.safetensors").touch()
    (files / "run" / "config.yaml").write_text("model: {checkpoint: m}\ndata: {train: d}\n")
    before = left(files)
    assert f"is {name}, which is a folder; give a file's name" in said(command.format(place=name), capsys)
    assert f"is file/{name}, where nothing can be written" in said(command.format(place=f"file/{name}"), capsys)
    assert left(files) == before


@pytest.mark.parametrize("command", ["align {config} --output {place}", "flow fit {config} --output {place}"])
def test_a_run_folder_cannot_be_where_a_file_is(files: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "run.yaml").write_text("model: {checkpoint: m}\ndata: {train: pairs.jsonl}\n")
    assert "output is file, which is a file" in said(command.format(config="run.yaml", place="file"), capsys)
    assert (files / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["select nope.parquet --by frs --out o.jsonl", "calibrate nope.parquet"])
def test_a_table_that_is_not_there_is_said_to_be_missing(files: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nope.parquet does not exist" in said(command, capsys)
