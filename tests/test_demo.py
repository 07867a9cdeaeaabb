"""What a demo may delete: its own earlier results, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowalign import cli, demo, demo_flow
from flowalign.errors import ConfigError
from flowalign.runs.folders import fresh
from flowalign.train.rundir import RunDir

SOMEONES = {"config.yaml": "model: {}\n", "flow/config.yaml": "a: 1\n", "weights/pytorch_lora_weights.safetensors": "days"}


@pytest.fixture
def clone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where demos find their samples."""
    monkeypatch.chdir(root)


@pytest.mark.parametrize("what", ["align", "flow"])
def test_a_folder_that_is_no_demos_stays_as_it_is(
    clone: None, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in SOMEONES.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cli.main(["demo", what, "--out", str(tmp_path / "run")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "delete it if it is an earlier demo, or give --out a new or empty folder" in said
    assert {name: (tmp_path / "run" / name).read_text() for name in SOMEONES} == SOMEONES


@pytest.mark.parametrize("config", [demo.CONFIG, demo_flow.CONFIG], ids=str)
def test_an_earlier_demo_is_replaced(clone: None, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    demo.begin(out, config)
    fresh(RunDir(out), resume=False)  # a run can be written there
    (out / "config.yaml").write_text("model: {}\n")
    demo.begin(out, config)
    assert [path.name for path in out.iterdir()] == [demo.MARK]
    (tmp_path / "empty").mkdir()
    demo.begin(tmp_path / "empty", config)
    assert (tmp_path / "empty" / demo.MARK).is_file()


def test_a_demo_outside_a_clone_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="run it in the root of a clone"):
        demo.begin(tmp_path / "out", demo.CONFIG)
    assert not (tmp_path / "out").exists()
