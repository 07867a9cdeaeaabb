"""Several processes are one run: with real ones that talk over gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from flowalign import config, device, runs
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch
from flowalign.errors import CheckpointError, ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.train.checkpoint import states
from tests.families.conftest import qwen_image
from tests.train.test_resume import FILES, SETTINGS, SIGNS, assert_same_run, forks, free_port, metrics

Make = Callable[..., Config]
GLOBAL = 4  # comparisons a step, however they are spread
SPREAD = (*SETTINGS, "train.learning_rate=1e-4", "train.caption_dropout=0.3")


def spread(settings: Make, output: Path, processes: int, *more: str) -> Config:
    size = GLOBAL // 2 // processes  # SETTINGS accumulate twice
    return settings(output, *SPREAD, f"train.batch_size={size}", *more)


@pytest.fixture(scope="module")
def two(settings: Make, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, str]:
    """Two processes: a run left alone (run-apart), one with two configurations, one that lost a process and went on."""
    folder = tmp_path_factory.mktemp("two")
    codes, said = forks("apart,unlike,lost,keep,ranks", spread(settings, folder / "run", 2), folder, 2, free_port())
    assert codes == {"apart": 0, "unlike": 1, "lost": 1, "keep": 0, "ranks": 0}, said
    return folder, said


def test_two_processes_are_one_with_twice_the_batch(settings: Make, two: tuple[Path, str], tmp_path: Path) -> None:
    runs.align(spread(settings, tmp_path / "one", 1), progress=False)
    one, both = (load_file(path / "weights" / FILES["lora"]) for path in (tmp_path / "one", two[0] / "run-apart"))
    assert one.keys() == both.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-6)
    for left, right in zip(metrics(tmp_path / "one", *SIGNS), metrics(two[0] / "run-apart", *SIGNS), strict=True):
        assert right == pytest.approx(left, rel=1e-3, abs=1e-4)
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 3e-4


@pytest.mark.usefixtures("one_thread")
def test_chunks_in_two_processes_are_one_process_without(settings: Make, tmp_path: Path) -> None:
    chunked = spread(settings, tmp_path / "run", 2, "train.backward=chunked", "train.chunk=1")
    codes, said = forks("ranks", chunked, tmp_path, 2, free_port())
    assert codes == {"ranks": 0}, said
    runs.align(spread(settings, tmp_path / "one", 1), progress=False)
    one, both = (load_file(tmp_path / name / "weights" / FILES["lora"]) for name in ("one", "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_family_with_layers_that_lead_nowhere_trains_in_two_processes(settings: Make, tmp_path: Path, kind: str) -> None:
    """Data parallelism would stop at the second backward, had any that is trained no gradient."""
    qwen_image().save_pretrained(tmp_path / "qwen")
    of = (f"model.checkpoint={tmp_path / 'qwen'}", "data.resolution=32", f"trainable.kind={kind}", "sample.steps=2")
    codes, said = forks("ranks", spread(settings, tmp_path / "run", 2, *of), tmp_path, 2, free_port())
    assert codes == {"ranks": 0}, said
    runs.align(spread(settings, tmp_path / "one", 1, *of), progress=False)
    file = FILES[kind].replace("unet", "transformer")
    one, both = (load_file(tmp_path / name / "weights" / file) for name in ("one", "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-5)


@pytest.fixture
def steered(votes: Path, tmp_path: Path) -> tuple[str, ...]:
    """Settings of a policy that is told weights of two objectives.

    Pictures have the names they have beside the votes: rows' ids, and all that is drawn by them, are the same in every run.
    """
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["objective_weights"] = {"red": place / 11, "blue": 1 - place / 11}
    shutil.copytree(votes.parent, tmp_path / "told")
    told = tmp_path / "told" / "told.jsonl"
    told.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"data.train={told}", f"data.validation={told}")
    return (*data, "steer={objectives: [red, blue], hidden: 8, dropout: 0.3}")


@pytest.mark.usefixtures("one_thread")
def test_a_steered_policy_in_two_processes_is_that_of_one(settings: Make, tmp_path: Path, steered: tuple[str, ...]) -> None:
    codes, said = forks("ranks", spread(settings, tmp_path / "run", 2, *steered), tmp_path, 2, free_port())
    assert codes == {"ranks": 0}, said
    runs.align(spread(settings, tmp_path / "one", 1, *steered), progress=False)
    for file in (FILES["lora"], "steer.safetensors"):
        one, both = (load_file(tmp_path / name / "weights" / file) for name in ("one", "run"))
        assert one.keys() == both.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-5)
    assert load_file(tmp_path / "run" / "weights" / "steer.safetensors")["layers.4.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_steered_policy_in_shards_is_that_of_one(
    settings: Make, tmp_path: Path, root: Path, steered: tuple[str, ...], trainable: str
) -> None:
    accelerate = ["accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--main_process_port"]
    shards = ["--config_file", str(root / "configs" / "accelerate" / "fsdp2.yaml")]
    more = (*steered, f"trainable.kind={trainable}", "train.learning_rate=1e-5")
    command = [sys.executable, "-m", *accelerate, str(free_port()), *shards]
    launched(command, spread(settings, tmp_path / "both", 2, *more), tmp_path)
    runs.align(spread(settings, tmp_path / "one", 1, *more), progress=False)
    one, both = (load_file(tmp_path / name / "weights" / "steer.safetensors") for name in ("one", "both"))
    apart = torch.cat([(one[name] - both[name]).abs().flatten() for name in one])
    assert one["layers.4.weight"].any()
    assert (apart > 1e-6).float().mean() < 0.02


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("held_out", [True, False])
def test_two_processes_find_the_beta_of_one(settings: Make, tmp_path: Path, held_out: bool) -> None:
    learns = ("trainable.kind=full", "train.learning_rate=1e-3", "train.steps=2", "objective.beta=auto")
    learns += ("switches.target_factor=0.45", *(() if held_out else ("data.validation=null", "data.held_out=0")))
    both, one = (settings(tmp_path / f"{size}", *learns, f"train.batch_size={size}") for size in (3, 6))
    codes, said = forks("ranks", both, tmp_path, 2, free_port())
    assert codes == {"ranks": 0}, said
    runs.align(one, progress=False)
    left, right = (json.loads((tmp_path / size / "beta.json").read_text()) for size in ("3", "6"))
    assert left["beta"] == pytest.approx(right["beta"], rel=1e-3)
    assert left["margin"]["deviation"] == pytest.approx(right["margin"]["deviation"], rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.optimizer=adamw8bit", r"'adamw8bit' keeps moments in blocks.*set train.optimizer=adamw.*ddp.yaml"),
        ("train.timesteps=importance", r"'importance' measures gradients of single.*set train.timesteps=null.*ddp.yaml"),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_lie_in_shards(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, said: str
) -> None:
    shards = SimpleNamespace(is_fsdp2=True, distributed_type=DistributedType.FSDP)  # which takes a launcher to be real
    monkeypatch.setattr(device, "open_accelerator", lambda train, folder: shards)
    assert device.make_accelerator(settings(tmp_path), tmp_path) is shards
    with pytest.raises(ConfigError, match=said):
        device.make_accelerator(settings(tmp_path, setting), tmp_path)


def test_processes_with_different_configurations_stop_with_a_sentence(two: tuple[Path, str]) -> None:
    sentence = "the processes of this run are not alike: train.learning_rate is 0.0001 in process 0 and 0.5 in process 1"
    assert two[1].count(f"ConfigError: {sentence}") == 2  # each of them says so


def test_a_killed_process_ends_the_others_and_leaves_a_run_that_goes_on_with_any_number_of_them(
    settings: Make, two: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of step 4; with as many processes the same bits come out, with another number the same order."""
    folder, said = two
    assert "PeerError: another process of this run ended or stopped answering" in said
    lost = folder / "run-kept"
    assert [path.name for path in states(lost / "state")] == ["step-00000002"]
    assert not (lost / "weights").exists()
    seen: list[int] = []
    step = PreferenceStep.__call__

    def record(self: PreferenceStep, batch: Batch, rng: Keyed) -> Any:
        seen.extend(batch.positions if self.policy.training else ())
        return step(self, batch, rng)

    alone = spread(settings, tmp_path / "alone", 1)
    shutil.copytree(lost, tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceStep, "__call__", record)
        runs.align(alone, resume=True, progress=False)
    assert seen == list(range(2 * GLOBAL, 6 * GLOBAL))
    weights = [load_file(path / "weights" / FILES["lora"]) for path in (tmp_path / "alone", folder / "run-apart")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)
    assert_same_run(folder / "run-apart", folder / "run", "lora")


def test_the_first_process_writes_the_run_folder_and_no_other_touches_it(two: tuple[Path, str]) -> None:
    """Every file there was written or moved there by process 0, alone or in a folder that was moved as a whole."""
    run = two[0] / "run-apart"
    first, second = ((two[0] / f"{run.name}-{index}.txt").read_text() for index in (0, 1))
    assert second == ""
    told = {path for event, _, path in (line.partition(" ") for line in first.splitlines()) if event != "os.mkdir"}
    there = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "report.html", "samples", "state", "weights"} <= {
        path.name for path in run.iterdir()
    }
    assert all(told & {str(path), *map(str, path.parents)} for path in there)


def test_a_resume_with_another_number_of_comparisons_a_step_is_refused(settings: Make, two: tuple[Path, str]) -> None:
    other = settings(two[0] / "run-apart", *SPREAD, f"train.batch_size={GLOBAL}")
    with pytest.raises(CheckpointError, match="pairs_per_step was 4 and is 8"):
        runs.align(other, resume=True, progress=False)


def launched(command: list[str], settings: Config, folder: Path) -> None:
    (folder / "config.yaml").write_text(config.dump(settings))
    environment = os.environ | {"PYTHONPATH": str(Path(runs.__file__).parents[2])}
    last = ["-m", "flowalign", "align", str(folder / "config.yaml"), "--json"]
    done = subprocess.run([*command, *last], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one of the processes speaks
    assert json.loads(line)["finished"] is True


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_timeout(settings: Make, tmp_path: Path) -> None:
    codes, said = forks("hung", spread(settings, tmp_path / "run", 2, "train.timeout=3.0"), tmp_path, 2, free_port())
    assert codes == {"hung": 1}
    assert "PeerError: another process of this run ended or stopped answering" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "ddp", "fsdp2"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_documented_launchers(settings: Make, tmp_path: Path, root: Path, name: str, trainable: str) -> None:
    """Also FSDP 2, with weights, moments and averages in shards: run, and gone on with by one process."""
    accelerate = ["accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--main_process_port"]
    command = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master-port", str(free_port())],
        "ddp": [*accelerate, str(free_port()), "--config_file", str(root / "configs" / "accelerate" / "ddp.yaml")],
        "fsdp2": [*accelerate, str(free_port()), "--config_file", str(root / "configs" / "accelerate" / "fsdp2.yaml")],
    }[name]
    more = (f"trainable.kind={trainable}", "train.learning_rate=1e-5")
    both = spread(settings, tmp_path / "both", 2, *more)
    launched([sys.executable, "-m", *command], both, tmp_path)
    runs.align(spread(settings, tmp_path / "one", 1, *more), progress=False)
    for kind, least in (("parameter", 0.0), ("ema", 0.0), ("optimizer/exp_avg/", 1e-6)):
        one, other = (load_file(states(tmp_path / each / "state")[-1] / "state.safetensors") for each in ("one", "both"))
        assert one.keys() == other.keys()
        part = [tensor for tensor in one if tensor.startswith(kind)]
        assert max(one[tensor].abs().max() for tensor in part) > least
        # AdamW makes full steps of gradients that are rounding errors, so a few weights may go elsewhere.
        apart = torch.cat([(one[tensor] - other[tensor]).abs().flatten() for tensor in part])
        assert (apart > 1e-6).float().mean() < 0.01, kind
    for left, right in zip(metrics(tmp_path / "one", *SIGNS), metrics(tmp_path / "both", *SIGNS), strict=True):
        assert right == pytest.approx(left, rel=1e-2, abs=1e-3)
    longer = spread(settings, tmp_path / "both", 1, *more, "train.steps=8")
    assert runs.align(longer, resume=True, progress=False)["finished"] is True
