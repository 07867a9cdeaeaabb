"""DeepSpeed moves the same weights, and leaves the same files, as runs without it; what it cannot do here is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flowalign import cli, config, runs
from flowalign.errors import ConfigError
from flowalign.settings import Train
from flowalign.train import zero
from flowalign.train.checkpoint import states
from tests.train.test_ranks import Make, launched, spread
from tests.train.test_resume import FILES, SIGNS, assert_same_run, forks, free_port, metrics

PLAIN: dict[str, Any] = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
    "gradient_clipping": "auto",
}


def test_the_section_train_decides_what_deepspeed_is_told() -> None:
    cfg = Train(batch_size=3, accumulation=4, clip_norm=0.5)
    found = zero.settled(PLAIN | {"gradient_accumulation_steps": 7, "gradient_clipping": 2.0}, cfg)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (3, 1)
    assert found["gradient_clipping"] == 0.5
    assert not found["bf16"]["enabled"]  # DeepSpeed's would cast the frozen weights, and those that learn
    assert zero.settled(PLAIN, Train(clip_norm=None))["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, r"ZeRO stage 3.*allowed: stage 1 and 2.*fsdp2.yaml"),
        ({"zero_optimization": {"stage": 0}}, r"ZeRO stage 0, which shards nothing.*ddp.yaml"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer to 'cpu'.*to none",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme"}}}, "offload_param to 'nvme'.*to none"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "sets zero_optimization.round_robin_gradients"),
        ({"optimizer": {"type": "Adam"}, "elasticity": {}}, "sets elasticity, optimizer"),
        ({"bf16": {"enabled": True}}, "turns bf16 on.*train.precision decides"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        zero.settled(PLAIN | change, Train())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "fp16"}, "allowed with DeepSpeed: bf16, fp32"),
        ({"optimizer": "adamw8bit"}, "'adamw8bit' keeps moments in blocks.*train.optimizer=adamw"),
    ],
)
def test_what_a_run_cannot_do_with_deepspeed_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        zero.settled(PLAIN, Train(**settings))


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (False, "needs the package 'deepspeed', which is not installed; run pip install 'flowalign[deepspeed]'."),
        (True, "accelerate's configuration asks for ZeRO stage 3"),
    ],
)
def test_a_launcher_that_asks_for_what_is_not_there_gets_one_sentence(
    settings: Make,
    tmp_path: Path,
    there: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: name if there else None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    (tmp_path / "my.yaml").write_text(config.dump(settings(tmp_path / "run")))
    assert cli.main(["align", str(tmp_path / "my.yaml")]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in printed
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_model_sets_its_precision_within_deepspeeds_forward() -> None:
    """On GPUs that turns the autocast around it off."""
    model = zero._InAutocast(nn.Linear(2, 2), partial(torch.autocast, "cpu", torch.bfloat16))
    with torch.autocast("cpu", enabled=False):
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    assert model.module.weight.dtype == torch.float32


@pytest.fixture(scope="module")
def installed() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'flowalign[deepspeed]')")


def asked(patch: pytest.MonkeyPatch, stage: str = "2") -> None:
    """Tell processes that are started what `accelerate launch` tells them."""
    patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    patch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)


@pytest.fixture(scope="module")
def apart(settings: Make, tmp_path_factory: pytest.TempPathFactory, installed: None) -> Callable[[str], Path]:
    """apart("2"): the folder of two processes under ZeRO 2: run-apart was left alone, run lost a process and went on, run-kept
    is a copy of it as it lay there, with the state of step 2, run-back was taken back to step 2 after step 4."""
    made: dict[str, Path] = {}

    def run(stage: str) -> Path:
        if stage not in made:
            folder = made[stage] = tmp_path_factory.mktemp(f"zero-{stage}")
            with pytest.MonkeyPatch.context() as patch:
                asked(patch, stage)
                codes, said = forks("apart,lost,keep,ranks,back", spread(settings, folder / "run", 2), folder, 2, free_port())
            assert codes == {"apart": 0, "lost": 1, "keep": 0, "ranks": 0, "back": 0}, said
            assert "PeerError: another process of this run ended or stopped answering" in said
        return made[stage]

    return run


@pytest.fixture(scope="module")
def alone(settings: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """alone("trainable.kind=full", ...): the folder of one process without DeepSpeed, with twice the batch."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*more: str) -> Path:
        if more not in made:
            made[more] = tmp_path_factory.mktemp("alone") / "run"
            runs.align(spread(settings, made[more], 1, *more), progress=False)
        return made[more]

    return run


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(states(run / "state")[-1] / "state.safetensors")


def assert_close_runs(one: Path, other: Path) -> None:
    """LoRA weights, their averages and moments, and metrics are those of the other run but for the order of sums."""
    left, right = (load_file(run / "weights" / FILES["lora"]) for run in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=0, atol=1e-6)
    left, right = state(one), state(other)
    assert left.keys() == right.keys()
    for name in (name for name in left if not name.startswith("learned/")):
        torch.testing.assert_close(right[name], left[name], rtol=0, atol=2e-6)
    assert {float(left[name]) for name in left if name.startswith("optimizer/step/")} == {6.0}
    assert max(left[name].abs().max() for name in left if name.startswith("optimizer/exp_avg/")) > 1e-3
    for before, after in zip(metrics(one, *SIGNS), metrics(other, *SIGNS), strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["1", "2"])
def test_two_processes_under_zero_are_one_with_twice_the_batch(
    apart: Callable[[str], Path], alone: Callable[..., Path], stage: str
) -> None:
    assert_close_runs(alone(), apart(stage) / "run-apart")
    norms = [line["train/grad_norm"] for line in metrics(apart(stage) / "run-apart") if "train/grad_norm" in line]
    assert min(norms) > 1.0 == Train().clip_norm  # so that every step was clipped


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_killed_run_under_zero_goes_on_in_the_same_bits(apart: Callable[[str], Path], stage: str) -> None:
    assert_same_run(apart(stage) / "run-apart", apart(stage) / "run", "lora")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_run_under_zero_that_is_taken_back_ends_in_the_same_bits(apart: Callable[[str], Path], stage: str) -> None:
    """Moments that are there already are replaced in place."""
    assert_same_run(apart(stage) / "run-apart", apart(stage) / "run-back", "lora")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_one_plain_process_goes_on_from_a_state_of_zero(
    settings: Make, apart: Callable[[str], Path], alone: Callable[..., Path], tmp_path: Path
) -> None:
    """Adam's step is about the learning rate, 1e-4, whatever the gradient, so lost moments would be seen at 1e-6."""
    shutil.copytree(apart("2") / "run-kept", tmp_path / "run")
    assert [path.name for path in states(tmp_path / "run" / "state")] == ["step-00000002"]
    runs.align(spread(settings, tmp_path / "run", 1), resume=True, progress=False)
    assert_close_runs(alone(), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "installed")
@pytest.mark.parametrize("stage", ["1", "2"])
def test_zero_goes_on_from_a_state_of_one_plain_process(
    settings: Make, alone: Callable[..., Path], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.align(spread(settings, tmp_path / "run", 1, "train.steps=2"), progress=False)
    asked(monkeypatch, stage)
    codes, said = forks("ranks", spread(settings, tmp_path / "run", 2), tmp_path, 2, free_port())
    assert codes == {"ranks": 0}, said
    one, other = (load_file(run / "weights" / FILES["lora"]) for run in (alone(), tmp_path / "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)
    for name, tensor in state(alone()).items():
        if not name.startswith("learned/"):
            torch.testing.assert_close(state(tmp_path / "run")[name], tensor, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_bf16_under_zero_is_that_of_two_plain_processes(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What learns stays float32 and the frozen base bfloat16: any other rounding would be seen in the third digit."""
    for name in ("plain", "zero"):
        if name == "zero":
            asked(monkeypatch)
        made = spread(settings, tmp_path / name, 2, "train.precision=bf16", "train.steps=4")
        codes, said = forks("ranks", made, tmp_path, 2, free_port())
        assert codes == {"ranks": 0}, said
    one, other = state(tmp_path / "plain"), state(tmp_path / "zero")
    assert one.keys() == other.keys()
    for name in (name for name in one if not name.startswith("learned/")):
        assert other[name].dtype == torch.float32
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "installed")
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_shipped_file_for_the_launcher(
    settings: Make, alone: Callable[..., Path], tmp_path: Path, root: Path, trainable: str
) -> None:
    """The documented command, then one process that goes on from its state for two more steps."""
    accelerate = [
        "accelerate.commands.accelerate_cli",
        "launch",
        "--num_processes",
        "2",
        "--main_process_port",
        str(free_port()),
    ]
    shipped = ["--config_file", str(root / "configs" / "accelerate" / "deepspeed.yaml")]
    more = (f"trainable.kind={trainable}", "train.learning_rate=1e-5")
    launched([sys.executable, "-m", *accelerate, *shipped], spread(settings, tmp_path / "both", 2, *more), tmp_path)
    assert_few_apart(alone(*more), tmp_path / "both")
    longer = (*more, "train.steps=8")
    runs.align(spread(settings, tmp_path / "both", 1, *longer), resume=True, progress=False)
    assert_few_apart(alone(*longer), tmp_path / "both")


def assert_few_apart(one: Path, other: Path) -> None:
    """AdamW makes full steps of gradients that are rounding errors, so a few of all weights may go elsewhere."""
    left, right = state(one), state(other)
    assert left.keys() == right.keys()
    for kind, least in (("parameter/", 0.0), ("ema/", 0.0), ("optimizer/exp_avg/", 1e-6), ("optimizer/exp_avg_sq/", 1e-12)):
        names = [name for name in left if name.startswith(kind)]
        assert max(left[name].abs().max() for name in names) > least
        apart = torch.cat([(left[name] - right[name]).abs().flatten() for name in names])
        assert (apart > 1e-6).float().mean() < 0.01, kind
