"""A run that is stopped, killed or spread over processes gives the files of a run that is left alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign import cli, config, runs
from flowalign.evaluate.guard import TIMES
from flowalign.settings import Config
from flowalign.train.checkpoint import states
from flowalign.train.rundir import RunDir

FORKS = Path(__file__).with_name("forks.py")
FILES = {"lora": "pytorch_lora_weights.safetensors", "full": "unet/diffusion_pytorch_model.safetensors"}
SETTINGS = ("train.steps=6", "train.accumulation=2", "train.ema=0.7", "train.save_every=2", "train.validate_every=3")
SIGNS = ("train/rewards/accuracies", *(f"eval/rewards/accuracies{part}" for part in ("", *(f"/{label}" for label in TIMES))))
"""Metrics that are signs of margins, which are about 0 yet."""

Make = Callable[..., Config]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(settings: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole("lora" or "full", ...): the folder of a run that nothing happened to."""
    made: dict[tuple[str, ...], Path] = {}

    def run(trainable: str, *more: str) -> Path:
        key = (trainable, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / trainable
            runs.align(settings(made[key], f"trainable.kind={trainable}", *SETTINGS, *more), progress=False)
        return made[key]

    return run


def metrics(run: Path, *but: str) -> list[dict[str, float]]:
    """Lines without what differs between any two runs, and without `but`."""
    apart = ("train/pairs_per_second", *but)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in apart} for line in lines]


def kinds(run: Path) -> Counter[tuple[str, float]]:
    """How many lines there are of each kind (train, eval) and step."""
    return Counter((next(name for name in line if "/" in name).partition("/")[0], line["step"]) for line in metrics(run))


def assert_same_run(one: Path, other: Path, trainable: str) -> None:
    assert (one / "weights" / FILES[trainable]).read_bytes() == (other / "weights" / FILES[trainable]).read_bytes()
    left, right = (load_file(states(run / "state")[-1] / "state.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert set(kinds(other).values()) == {1}
    assert metrics(one) == metrics(other)


def forks(names: str, settings: Config, folder: Path, *numbers: int) -> tuple[dict[str, int], str]:
    """Exit codes of the commands of forks.py with these names, and what they printed."""
    (folder / "forks.yaml").write_text(config.dump(settings))
    command = [sys.executable, str(FORKS), names, str(folder / "forks.yaml"), *map(str, numbers)]
    paths = [str(Path(runs.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": ":".join(paths)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = {name: int(code) for name, code in re.findall(rf"^({names.replace(',', '|')}) (-?\d+)$", done.stdout, re.MULTILINE)}
    assert set(codes) == set(names.split(","))
    return codes, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("trainable", "more"), [("lora", ()), ("full", ()), ("full", ("train.optimizer=adamw8bit",))], ids=["lora", "full", "8bit"]
)
def test_stopped_by_signals_and_resumed(
    settings: Make,
    whole: Callable[..., Path],
    tmp_path: Path,
    trainable: str,
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Through the command line: stopping is no failure, and what is printed says how to go on."""
    if more:
        request.getfixturevalue("bitsandbytes")
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(settings(tmp_path / "run", f"trainable.kind={trainable}", *SETTINGS, *more)))
    stops = {1: signal.SIGINT, 5: signal.SIGTERM}
    record = RunDir.record

    def stop_after(self: RunDir, step: int, values: dict[str, float]) -> None:
        record(self, step, values)
        if "train/loss" in values and step in stops:
            os.kill(os.getpid(), stops.pop(step))

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "record", stop_after)
        assert cli.main(["align", str(path)]) == 0
        assert (
            f"stopped; step 1 is saved. Continue with: flowalign align {tmp_path / 'run'} --resume" in capsys.readouterr().out
        )
        assert not (tmp_path / "run" / "weights").exists()
        assert cli.main(["align", str(path), "--resume"]) == 0
        assert "stopped; step 5 is saved" in capsys.readouterr().out
    assert cli.main(["align", str(tmp_path / "run"), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"] is True
    assert_same_run(whole(trainable, *more), tmp_path / "run", trainable)
    saved = load_file(states(tmp_path / "run" / "state")[-1] / "state.safetensors")
    dtypes = {tensor.dtype for name, tensor in saved.items() if name.startswith("optimizer/")}
    assert (torch.uint8 in dtypes) is bool(more)


def test_killed_at_random_moments_and_resumed(settings: Make, whole: Callable[..., Path], tmp_path: Path) -> None:
    codes, said = forks("kill", settings(tmp_path / "run", *SETTINGS), tmp_path, 3, 0)
    assert codes == {"kill": 0}, said
    assert said.count("killed") >= 2
    assert_same_run(whole("lora"), tmp_path / "run", "lora")


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_ten_times_and_resumed(settings: Make, tmp_path: Path, trainable: str, seed: int) -> None:
    longer = (*SETTINGS, f"trainable.kind={trainable}", "train.steps=24", "train.save_every=1")
    runs.align(settings(tmp_path / "whole", *longer), progress=False)
    codes, said = forks("kill", settings(tmp_path / "run", *longer), tmp_path, 10, seed)
    assert codes == {"kill": 0}, said
    assert said.count("killed") >= 8
    assert_same_run(tmp_path / "whole", tmp_path / "run", trainable)


def test_resuming_a_finished_run_changes_nothing(settings: Make, whole: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(whole("lora"), tmp_path / "run")
    again = runs.align(settings(tmp_path / "run", *SETTINGS), resume=True, progress=False)
    assert again["finished"] is True
    assert_same_run(whole("lora"), tmp_path / "run", "lora")


def test_a_half_written_state_is_passed_over(settings: Make, whole: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(whole("lora"), tmp_path / "run")
    state = tmp_path / "run" / "state"
    shutil.rmtree(state / "step-00000006")
    (state / ".step-00000006.abcd.tmp").mkdir()
    (state / ".step-00000006.abcd.tmp" / "state.safetensors").write_bytes(b"\x08\x00\x00")
    runs.align(settings(tmp_path / "run", *SETTINGS), resume=True, progress=False)
    assert_same_run(whole("lora"), tmp_path / "run", "lora")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("objective.beta=900.0", "objective.beta was 500.0 and is 900.0"),
        ("objective={name: ipo}", "objective.name was dpo and is ipo"),
        ("trainable.rank=8", "trainable.rank was 4 and is 8"),
        ("train.seed=3", "train.seed was 0 and is 3"),
        ("data.resolution=32", "data.resolution was 16 and is 32"),
        ("data.flip=true", "data.flip was None and is True"),
        ("train.steps=4", "train.steps is 4, and {run} has trained 6 steps already"),
    ],
)
def test_a_resume_with_other_settings_is_refused_and_leaves_the_run_alone(
    whole: Callable[..., Path], tmp_path: Path, change: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole("lora"), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert cli.main(["align", str(tmp_path / "run"), "--resume", "--set", change]) == 2
    assert said.format(run=tmp_path / "run") in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_stopped_run_is_finished_with_the_steps_that_it_has(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the refusal of fewer says; the weights are those of a run that was to have no more."""
    record, stops = RunDir.record, iter([True])

    def stop_once(self: RunDir, step: int, values: dict[str, float]) -> None:
        record(self, step, values)
        if step == 2 and next(stops, False):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunDir, "record", stop_once)
    made = settings(tmp_path / "run", "train.steps=9")
    assert runs.align(made, progress=False)["finished"] is False
    enough = settings(tmp_path / "run", "train.steps=2")
    assert runs.align(enough, resume=True, progress=False)["finished"] is True
    runs.align(settings(tmp_path / "whole", "train.steps=2"), progress=False)
    one, other = (tmp_path / name / "weights" / FILES["lora"] for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("timesteps", ["stratified", pytest.param("importance", marks=pytest.mark.slow)])
def test_eight_at_once_are_two_four_times(settings: Make, tmp_path: Path, timesteps: str) -> None:
    common = ("train.steps=2", "train.learning_rate=1e-4", "train.caption_dropout=0.3", f"train.timesteps={timesteps}")
    shapes = {"whole": (8, 1), "accumulated": (2, 4)}
    made = {
        name: settings(tmp_path / name, *common, f"train.batch_size={size}", f"train.accumulation={times}")
        for name, (size, times) in shapes.items()
    }
    runs.align(made["whole"], progress=False)
    runs.align(made["accumulated"], progress=False)
    weights = {name: load_file(tmp_path / name / "weights" / FILES["lora"]) for name in shapes}
    for key, tensor in weights["whole"].items():
        torch.testing.assert_close(weights["accumulated"][key], tensor, rtol=0, atol=1e-5)
    for one, other in zip(metrics(tmp_path / "whole", *SIGNS), metrics(tmp_path / "accumulated", *SIGNS), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    start = load_file(tmp_path / "whole" / "weights" / FILES["lora"])
    assert max(tensor.abs().max() for key, tensor in start.items() if "lora.up" in key or "lora_B" in key) > 1e-4
