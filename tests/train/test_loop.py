"""The training loop on a model small enough to follow by hand: a line fitted to points."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from flowalign.errors import NonFiniteError
from flowalign.rng import Keyed
from flowalign.settings import Train
from flowalign.train.checkpoint import State, go_back, load, save, states
from flowalign.train.loop import Hooks, fit, learning_rate
from flowalign.train.ranks import Ranks

ABOUT: dict[str, object] = {"objective": {"name": "line"}}


@dataclass
class Line:
    """y = w·x towards y = 2·x + noise; batch k of the endless sequence holds x = keyed numbers of its positions."""

    folder: Path
    cfg: Train
    model: nn.Linear = field(default_factory=lambda: nn.Linear(3, 1, bias=False))
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW
    records: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    act: Callable[[int], Any] = lambda micro: None
    judge: Callable[[Line, bool], Any] = lambda line, broken: "on"

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([[0.5, -0.5, 1.0]]))
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True)
        self.optimizer = self.kind(self.model.parameters(), lr=1.0)
        self.prepared, prepared = self.accelerator.prepare(self.model, self.optimizer)
        ema = {"weight": self.model.weight.detach().clone()} if self.cfg.ema else None
        self.state = State({"weight": self.model.weight}, prepared, ema)

    def batches(self, position: int) -> Iterator[Any]:
        while True:
            place = list(range(position, position + self.cfg.batch_size))
            yield torch.stack([Keyed(1).normal("x", [p], [0], (3,))[0] for p in place])
            position += self.cfg.batch_size

    def step(self, x: Any, rng: Keyed) -> tuple[Tensor, dict[str, Tensor]]:
        self.act(len(self.losses))
        loss = (self.prepared(x)[:, 0] - 2 * x.sum(1)).square()
        self.losses.append(loss.mean().item())
        return loss, {"loss": loss.detach()}

    def record(self, step: int, values: dict[str, float]) -> None:
        self.records.append((step, values))
        self.events.extend((name, step) for name in {key.partition("/")[0] for key in values})

    def fit(self) -> bool:
        if found := states(self.folder):
            load(found[-1], self.state, ABOUT)
        hooks = Hooks(
            self.record,
            lambda: {"loss": 1.0},
            lambda step: self.events.append(("sample", step)),
            judge=lambda broken: self.judge(self, broken),
        )
        return fit(
            self.accelerator,
            self.prepared,
            self.state,
            self.batches,
            self.step,
            self.cfg,
            hooks,
            self.folder,
            ABOUT,
            progress=False,
        )

    def weight(self) -> Tensor:
        return self.model.weight.detach().clone()


def by_hand(cfg: Train, folder: Path, kind: type[torch.optim.Optimizer]) -> tuple[Tensor, Tensor]:
    """Weights and their average after plain PyTorch steps over whole batches, no loop of ours."""
    line = Line(folder, cfg)
    model, ema = line.model, line.model.weight.detach().clone()
    optimizer = kind(model.parameters(), lr=1.0)
    stream = Line(folder, cfg.model_copy(update={"batch_size": cfg.batch_size * cfg.accumulation})).batches(0)
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        x = next(stream)
        loss = ((model(x)[:, 0] - 2 * x.sum(1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        if cfg.clip_norm is not None:
            grad = model.weight.grad
            assert grad is not None
            grad *= min(1.0, cfg.clip_norm / (float(grad.norm()) + 1e-6))
        optimizer.step()
        if cfg.ema:
            ema = cfg.ema * ema + (1 - cfg.ema) * model.weight.detach()
    return model.weight.detach(), ema


def test_learning_rates_by_hand() -> None:
    rates = {
        name: [learning_rate(step, Train(steps=10, warmup_steps=2, learning_rate=8.0, schedule=name)) for step in range(10)]
        for name in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [4.0] + [8.0] * 9
    assert rates["linear"] == [4.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert rates["cosine"] == pytest.approx([4.0, 8.0] + [4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert rates["cosine"][6] == pytest.approx(4.0)  # half of the peak, half of the way
    assert learning_rate(0, Train(steps=1, learning_rate=8.0, schedule="cosine")) == 8.0
    assert learning_rate(3, Train(steps=2, warmup_steps=8, learning_rate=8.0)) == 4.0  # a run shorter than its warm-up


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.1},
        {"clip_norm": None},
        {"accumulation": 3, "clip_norm": None},
        {"ema": 0.8},
        {"ema": 0.8, "accumulation": 2, "schedule": "cosine", "warmup_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])  # AdamW alone is blind to the gradient's scale
def test_the_loop_is_plain_steps(tmp_path: Path, changes: dict[str, Any], kind: type[torch.optim.Optimizer]) -> None:
    cfg = Train(**{"steps": 5, "batch_size": 4, "learning_rate": 0.05, "clip_norm": 1.0} | changes)
    line = Line(tmp_path, cfg, kind=kind)
    assert line.fit() is True
    weight, ema = by_hand(cfg, tmp_path / "other", kind)
    torch.testing.assert_close(line.weight(), weight, rtol=0, atol=1e-6)
    if cfg.ema:
        assert line.state.ema is not None
        torch.testing.assert_close(line.state.ema["weight"], ema, rtol=0, atol=1e-6)
        assert (ema - weight).abs().max() > 1e-2


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    cfg = Train(steps=1, batch_size=4, learning_rate=1.0, clip_norm=0.01)
    line = Line(tmp_path, cfg, kind=torch.optim.SGD)
    before = line.weight()
    line.fit()
    assert (line.weight() - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert dict(line.records[1][1])["train/grad_norm"] > 1  # the norm before clipping is what is recorded


def test_metrics_are_means_over_accumulation_and_over_the_steps_between_two_lines(tmp_path: Path) -> None:
    line = Line(tmp_path, Train(steps=5, batch_size=2, accumulation=3, log_every=2, learning_rate=0.01))
    line.fit()
    lines = [(step, values) for step, values in line.records if "train/loss" in values]
    assert [step for step, _ in lines] == [2, 4, 5]
    for (_, values), part in zip(lines, (slice(0, 6), slice(6, 12), slice(12, 15)), strict=True):
        micro = line.losses[part]
        assert values["train/loss"] == pytest.approx(sum(micro) / len(micro))
        assert values["train/lr"] == 0.01
        assert values["train/pairs_per_second"] > 0


def test_what_is_done_when(tmp_path: Path) -> None:
    cfg = Train(steps=6, batch_size=1, log_every=4, validate_every=3, sample_every=2, save_every=4, keep_checkpoints=9)
    line = Line(tmp_path, cfg)
    line.fit()
    assert [step for name, step in line.events if name == "eval"] == [0, 3, 6]
    assert [step for name, step in line.events if name == "sample"] == [2, 4]  # the last ones are drawn from the final weights
    assert [step for name, step in line.events if name == "train"] == [4, 6]
    assert [path.name for path in states(tmp_path)] == ["step-00000004", "step-00000006"]


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    Line(tmp_path, Train(steps=7, batch_size=1, save_every=1, keep_checkpoints=3)).fit()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000005", "step-00000006", "step-00000007"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    cfg = Train(steps=6, batch_size=2, accumulation=2, save_every=None)
    before = signal.getsignal(number)
    line = Line(tmp_path, cfg, act=lambda micro: os.kill(os.getpid(), number) if micro == 4 else None)
    assert line.fit() is False
    assert [path.name for path in states(tmp_path)] == ["step-00000003"]
    assert len(line.losses) == 6  # the step in hand was finished
    assert signal.getsignal(number) is before
    assert [step for name, step in line.events if name == "train"] == [3]


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    line = Line(tmp_path, Train(steps=6, batch_size=2, accumulation=4), act=lambda micro: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        line.fit()
    assert len(line.losses) <= 2


@pytest.mark.parametrize("stops", [(2,), (3,), (1, 2, 5, 6)], ids=str)
@pytest.mark.parametrize("ema", [None, 0.7])
def test_a_run_stopped_and_resumed_ends_in_the_same_bits(tmp_path: Path, stops: tuple[int, ...], ema: float | None) -> None:
    cfg = Train(steps=7, batch_size=2, accumulation=2, learning_rate=0.05, warmup_steps=2, schedule="cosine", ema=ema)
    whole = Line(tmp_path / "whole", cfg)
    whole.fit()
    for stop in stops:
        done = int(found[-1].name[5:]) if (found := states(tmp_path / "parts")) else 0

        def act(micro: int, last: int = 2 * (stop - done) - 1) -> None:
            if micro == last:
                os.kill(os.getpid(), signal.SIGTERM)

        assert Line(tmp_path / "parts", cfg, act=act).fit() is False
        assert states(tmp_path / "parts")[-1].name == f"step-{stop:08d}"
    parts = Line(tmp_path / "parts", cfg)
    assert parts.fit() is True
    assert torch.equal(parts.weight(), whole.weight())
    one, other = (load_file(states(folder)[-1] / "state.safetensors") for folder in (tmp_path / "whole", tmp_path / "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("broken", ["weight", "gradient"])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, broken: str) -> None:
    cfg = Train(steps=9, batch_size=2, save_every=2, log_every=9, keep_checkpoints=9)
    line = Line(tmp_path, cfg)

    def act(micro: int) -> None:
        if micro == 4 and broken == "weight":
            line.model.weight.data[0, 0] = math.nan
        if micro == 4 and broken == "gradient":
            line.model.weight.register_hook(lambda grad: grad * math.inf)

    line.act = act
    with pytest.raises(NonFiniteError, match=r"grad_norm.* became NaN or infinite between steps 4 and 6"):
        line.fit()
    assert [path.name for path in states(tmp_path)] == ["step-00000002", "step-00000004"]
    assert all(load_file(path / "state.safetensors")["parameter/weight"].isfinite().all() for path in states(tmp_path))


def test_a_judge_that_lowers_the_rate_changes_the_steps_after_it(tmp_path: Path) -> None:
    """Half the rate from step 2 on, by hand; the saved state remembers it."""
    cfg = Train(steps=4, batch_size=4, log_every=2, save_every=3, learning_rate=0.05, clip_norm=None)

    def judge(line: Line, broken: bool) -> str:
        line.state.rate = 0.5 if line.state.step >= 2 else 1.0
        return "on"

    line = Line(tmp_path, cfg, kind=torch.optim.SGD, judge=judge)
    line.fit()
    weight = Line(tmp_path / "other", cfg).weight()
    stream = line.batches(0)
    for rate in (0.05, 0.05, 0.025, 0.025):
        x = next(stream)
        weight -= rate * (2 * ((x @ weight.T)[:, 0] - 2 * x.sum(1))[:, None] * x).mean(0)
    torch.testing.assert_close(line.weight(), weight, rtol=0, atol=1e-6)
    assert [values["train/lr"] for _, values in line.records if "train/lr" in values] == [0.05, 0.025, 0.025]
    other = Line(tmp_path, cfg)
    load(tmp_path / "step-00000003", other.state, ABOUT)
    assert other.state.rate == 0.5


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_taken_back_goes_on_as_one_resumed_there_at_another_rate(tmp_path: Path, broken: bool) -> None:
    """What made a metric not finite is gone with the state, where it was the state."""
    cfg = Train(steps=8, batch_size=2, log_every=2, save_every=2, keep_checkpoints=1, learning_rate=0.05, ema=0.7)
    judged: list[tuple[int, bool]] = []

    def judge(line: Line, found: bool) -> str:
        step = line.state.step
        judged.append((step, found))
        if step == 6 and line.state.rate == 1.0:
            line.state.rate = 0.5
            go_back(line.folder, line.state, ABOUT, Ranks(line.accelerator, 1.0))
            return "back"
        return "good" if step == 4 else "on"

    def act(micro: int) -> None:
        if broken and micro == 5:
            line.model.weight.data[0, 0] = math.nan

    line = Line(tmp_path / "run", cfg, judge=judge, act=act)
    assert line.fit() is True
    assert judged == [(0, False), (2, False), (4, False), (6, broken), (6, False), (8, False)]
    shutil.copytree(tmp_path / "run" / "step-00000004", tmp_path / "other" / "step-00000004")
    other = Line(tmp_path / "other", cfg, judge=lambda line, _: setattr(line.state, "rate", 0.5) or "on")
    load(tmp_path / "other" / "step-00000004", other.state, ABOUT)
    other.state.rate = 0.5
    save(tmp_path / "other", other.state, ABOUT, 9)
    assert other.fit() is True
    assert torch.equal(line.weight(), other.weight())
    assert line.state.ema is not None
    assert other.state.ema is not None
    assert torch.equal(line.state.ema["weight"], other.state.ema["weight"])
    assert [path.name for path in states(tmp_path / "run")] == [
        "step-00000004",
        "step-00000008",
    ]  # the good one, and the newest


@pytest.mark.parametrize("broken", [False, True])
def test_a_judge_ends_the_run_and_nothing_broken_is_saved(tmp_path: Path, broken: bool) -> None:
    def act(micro: int) -> None:
        if broken and micro == 3:
            line.model.weight.data[0, 0] = math.nan

    cfg = Train(steps=8, batch_size=2, log_every=2, save_every=None)
    line = Line(tmp_path, cfg, judge=lambda line, found: "stop" if line.state.step == 4 else "good", act=act)
    assert line.fit() is False
    assert len(line.losses) == 4
    assert [path.name for path in states(tmp_path)] == ["step-00000000"] + ([] if broken else ["step-00000004"])


def test_a_judge_may_end_a_run_before_its_first_step(tmp_path: Path) -> None:
    line = Line(tmp_path, Train(steps=8, batch_size=2), judge=lambda line, found: "stop")
    before = line.weight().clone()
    assert line.fit() is False
    assert line.losses == []
    assert torch.equal(line.weight(), before)


def test_a_run_taken_back_to_its_start_is_not_validated_there_again(tmp_path: Path) -> None:
    line = Line(tmp_path, Train(steps=2, batch_size=2), judge=lambda line, broken: "good")
    line.fit()
    for path in states(tmp_path)[1:]:
        shutil.rmtree(path)
    again = Line(tmp_path, line.cfg)
    again.fit()
    assert [step for name, step in again.events if name == "eval"] == [2]
    assert torch.equal(again.weight(), line.weight())


def test_saving_at_a_step_that_is_saved_already_replaces_it(tmp_path: Path) -> None:
    line = Line(tmp_path, Train(steps=2, batch_size=2))
    line.fit()
    with torch.no_grad():
        line.model.weight.fill_(3.0)
    path = save(tmp_path, line.state, ABOUT, 2)
    assert load_file(path / "state.safetensors")["parameter/weight"].tolist() == [[3.0] * 3]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
