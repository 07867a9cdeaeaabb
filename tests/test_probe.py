"""The probe for β: its arithmetic by hand, and what a run does with what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from flowalign import config as configuration
from flowalign import probe, runs
from flowalign.cli import main
from flowalign.errors import CheckpointError, ConfigError, RunError
from flowalign.plan.predict import predict
from flowalign.settings import Config
from flowalign.setup import Prepared, load_objective
from flowalign.train.trainable import trained

Make = Callable[..., Config]
LEARNS = ("trainable.kind=full", "train.learning_rate=1e-3", "train.steps=3", "train.batch_size=6")


def test_one_margin_is_solved_in_closed_form() -> None:
    """σ(−βΔ) = 0.3 where βΔ = log(7/3)."""
    assert probe.solve(torch.tensor([0.02], dtype=torch.float64), 0.3) == pytest.approx(math.log(7 / 3) / 0.02, rel=1e-9)


def test_the_suggested_beta_leaves_the_target() -> None:
    margins = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3e-3 + 4e-3
    for target in (0.45, 0.3, 0.2):
        beta = probe.solve(margins, target)
        assert torch.sigmoid(-beta * margins).mean().item() == pytest.approx(target, abs=1e-9)
        assert torch.sigmoid(-0.9 * beta * margins).mean().item() > target
        assert probe.solve(10 * margins, target) == pytest.approx(beta / 10, rel=1e-6)


def test_margins_that_are_wrong_too_often_have_no_beta() -> None:
    with pytest.raises(RunError, match=r"the lowest is 0\.4\d, because 40% of the margins are not positive"):
        probe.solve(torch.tensor([1.0] * 6 + [-1.0] * 4, dtype=torch.float64), 0.3)
    for margins in ([0.0, 0.0], [0.1, -0.3]):
        with pytest.raises(RunError, match="did not learn the preference"):
            probe.solve(torch.tensor(margins, dtype=torch.float64), 0.3)


def test_the_command_prints_a_table_and_leaves_nothing(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(configuration.dump(settings(tmp_path / "run", *LEARNS)))
    assert main(["suggest-beta", str(path), "--steps", "20", "--target", "0.45", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steps"] == 20
    assert found["probed_at"] == 500.0
    assert [row["beta"] / found["beta"] for row in found["table"]] == pytest.approx([0.25, 0.5, 1, 2, 4])
    assert found["table"][2]["factor"] == pytest.approx(0.45, abs=1e-6)
    factors = [row["factor"] for row in found["table"]]
    assert factors == sorted(factors, reverse=True)
    assert "use it: --set objective.beta=" in found["summary"]
    assert not (tmp_path / "run").exists()


def test_pictures_that_were_judged_alone_are_probed_by_their_labels(
    settings: Make, prepared: Callable[..., Prepared], votes: Path, tmp_path: Path
) -> None:
    """h of those wanted, −h of the others: turned around where the labels are."""
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    for name, wanted in (("right", ("chosen",)), ("wrong", ("rejected",)), ("all", ("chosen", "rejected"))):
        alone = [
            {"prompt": row["prompt"], "image": str(votes.parent / row[side]), "label": side in wanted}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))

    def kto(name: str) -> tuple[str, ...]:
        path = tmp_path / f"{name}.jsonl"
        return ("objective={name: kto, beta: 500.0}", f"data.train={path}", f"data.validation={path}", *LEARNS)

    found = runs.suggest_beta(settings(tmp_path / "run", *kto("all")), steps=20, target=0.45, progress=False)
    assert found["table"][2]["factor"] == pytest.approx(0.45, abs=1e-6)
    assert found["margin"]["mean"] > 0
    margins = []
    for name in ("right", "wrong"):
        ready = prepared(*kto(name))
        with torch.no_grad():
            for parameter in trained(ready.policy).values():
                parameter *= 1.05
        margins.append(probe._margins(ready))
    assert margins[0].abs().min() > 0
    assert torch.equal(margins[0], -margins[1])


def test_auto_is_found_once_and_a_resumed_run_keeps_it(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "suggest", partial(probe.suggest, steps=20))
    auto = ("objective.beta=auto", "switches.target_factor=0.45", *LEARNS)
    runs.align(settings(tmp_path / "whole", *auto), progress=False)
    said = json.loads((tmp_path / "whole" / "beta.json").read_text())
    kept = configuration.load(tmp_path / "whole" / "config.yaml").objective.knobs["beta"]
    assert kept == float(f"{said['beta']:.2g}")
    runs.align(settings(tmp_path / "parts", *auto, "train.steps=2"), progress=False)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a resumed run probes again")

    monkeypatch.setattr(probe, "suggest", never)
    runs.align(settings(tmp_path / "parts", *auto), resume=True, progress=False)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[row["train/loss"] for row in map(json.loads, each) if "train/loss" in row] for each in lines]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("began", ["objective={name: dpo}", "objective={name: dpo, beta: 700.0}"])
def test_a_run_that_began_with_a_beta_goes_on_with_it(settings: Make, tmp_path: Path, began: str) -> None:
    """The default one is written nowhere."""
    runs.align(settings(tmp_path / "run", began, *LEARNS, "train.steps=2"), progress=False)
    auto = ("objective={name: dpo, beta: auto}", *LEARNS)
    assert runs.align(settings(tmp_path / "run", *auto), resume=True, progress=False)["finished"]
    kept = load_objective(configuration.load(tmp_path / "run" / "config.yaml"))[1]["beta"]
    assert kept == load_objective(settings(tmp_path, began))[1]["beta"]
    assert not (tmp_path / "run" / "beta.json").exists()


def test_auto_does_not_go_on_with_another_objective(settings: Make, tmp_path: Path) -> None:
    runs.align(settings(tmp_path / "run", "objective={name: ipo}", *LEARNS, "train.steps=2"), progress=False)
    with pytest.raises(CheckpointError, match=r"objective\.name was ipo and is dpo"):
        runs.align(settings(tmp_path / "run", "objective={name: dpo, beta: auto}", *LEARNS), resume=True, progress=False)


def test_a_plan_does_without_the_probe(settings: Make, tmp_path: Path) -> None:
    auto, given = (settings(tmp_path, f"objective.beta={beta}") for beta in ("auto", "500.0"))
    plans = [predict(config, 0.4, {}, None) for config in (auto, given)]
    assert plans[0]["flops_per_comparison"] == plans[1]["flops_per_comparison"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("objective={name: ipo}",), "'ipo' has no beta that scales a margin"),
        (("objective={name: simpo}",), "'simpo' has no beta that scales a margin against a reference"),
    ],
)
def test_an_objective_without_such_a_beta_is_refused(settings: Make, tmp_path: Path, overrides: tuple[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        runs.suggest_beta(settings(tmp_path, *overrides), progress=False)


def test_a_target_that_no_mean_can_have_is_refused(settings: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the target is 0\.6; a mean"):
        runs.suggest_beta(settings(tmp_path), target=0.6, progress=False)
