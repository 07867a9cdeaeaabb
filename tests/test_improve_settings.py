"""What an improvement loop refuses before it draws, and with which settings it goes on."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowalign import runs
from flowalign.errors import ConfigError, RunError
from flowalign.improve_settings import ImproveConfig
from flowalign.scoring.table import read_table
from tests.test_improve import Make, loops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loop(folders: dict[str, Path]) -> Make:
    """Over one round, as small as it can be."""
    return loops(
        folders["epsilon"],
        train={"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "log_every": 1},
        prompts=["a thing", "b thing", "c thing"],
        held_out=1,
        rounds=1,
        draw={"prompts": 1, "images": 2, "steps": 1},
        trainable={"rank": 2},
    )


@pytest.fixture(scope="module")
def whole(loop: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished loop of two rounds, each with a prompt of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.improve(loop(folder, "rounds=2"), progress=False)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.bta=5"], "objective.bta is not a knob of 'dpo'; did you mean 'beta'"),
        (["objective.name=dop"], "'dop' is not one of the objectives"),
        (["objective.beta=much"], "objective.beta of 'dpo' cannot be 'much'"),
        (["train.precision=fp16"], "train.precision 'fp16' needs a GPU"),
        (["train.device=gpu"], "device 'gpu' is not available here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_training_would_refuse_is_said_before_anything_is_drawn(
    loop: Make, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        runs.improve(loop(tmp_path / "run", *overrides), progress=False)
    assert not (tmp_path / "run").exists()


def test_what_only_training_reads_may_change_until_it_begins(copied: Path, loop: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ("rounds=2", "objective.beta=400", "trainable.rank=3", "train.steps=2", "reference.kind=copy", "sample.count=2")
    with pytest.raises(ConfigError, match="begun with another objective and reference and trainable and train and sample"):
        runs.improve(loop(copied, *other), resume=True, progress=False)
    (copied / "improve.json").unlink()
    for number in ("00", "01"):
        for path in (copied / "rounds" / number).glob("align*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    asked = list[ImproveConfig]()

    def asking(of: Any, number: int) -> dict[str, Any]:
        asked.append(of.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("flowalign.runs.improvement"), "train_round", asking)
    assert not runs.improve(loop(copied, *other), resume=True, progress=False)["finished"]
    assert asked == [loop(copied, *other)]
    for kept in ("trainable.kind=full", "train.precision=bf16", "switches.noise=stored"):
        with pytest.raises(ConfigError, match="before the first round trains, objective, reference, sample, train, trainable"):
            runs.improve(loop(copied, *other, kept), resume=True, progress=False)


def test_rounds_are_as_many_as_the_base_has_drawn_for(copied: Path, loop: Make) -> None:
    """Fewer and then as many again are what it has drawn for; one more is not."""
    for rounds in (1, 2):
        found = runs.improve(loop(copied, f"rounds={rounds}"), resume=True, progress=False)
        assert (found["finished"], len(found["rounds"])) == (True, rounds)
    plan = copied / "rounds" / "base" / "pictures" / "plan.jsonl"
    lines = plan.read_text().splitlines()
    plan.write_text("".join(line + "\n" for line in lines if json.loads(line)["prompt"] == json.loads(lines[0])["prompt"]))
    with pytest.raises(ConfigError, match=r"rounds is 2, and from round 2 on .*draw.prompts=1 .* allowed: rounds up to 1"):
        runs.improve(loop(copied, "rounds=2"), resume=True, progress=False)


def test_a_held_out_picture_without_a_score_is_scored_again(copied: Path, loop: Make) -> None:
    path = copied / "rounds" / "01" / "evaluation" / "scores.parquet"
    table = read_table(path)
    scores, why = table.raw("colourfulness"), [None] * len(table)
    scores[1], why[1] = np.nan, "out of memory"  # type: ignore[call-overload]
    table.having({"raw.colourfulness": scores, "why.colourfulness": why}).write(path)
    with pytest.raises(RunError, match=r"colourfulness gave no score .* the first .*png \(out of memory\); --resume tries"):
        runs.improve(loop(copied, "rounds=2"), resume=True, progress=False)
    assert runs.improve(loop(copied, "rounds=2"), resume=True, progress=False)["finished"]
    assert not np.isnan(read_table(path).raw("colourfulness")).any()
