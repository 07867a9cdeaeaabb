"""The whole plan: arithmetic by hand, the page, and that no weights are needed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flowalign import cli, runs
from flowalign.config import dump
from flowalign.errors import CheckpointError, ConfigError
from flowalign.plan.data import Counted
from flowalign.plan.flops import Flops
from flowalign.plan.gpus import GPUS
from flowalign.plan.page import size, time
from flowalign.plan.page import work as shown
from flowalign.plan.work import Work, on_gpus, work
from flowalign.settings import Config

Settings = Callable[..., Config]
FLOPS = Flops(policy_forward=10, policy_backward=25, reference=9, images=8, prompts=3)
COUNTED = Counted(train=50, held_out=6, pictures=112, prompts=40, exact=True)
RUN = ("train.steps=7", "train.batch_size=4", "train.accumulation=5", "train.validation_draws=3", "train.validate_every=3")


def test_stages_multiply_out(settings: Settings, tmp_path: Path) -> None:
    live = work(settings(tmp_path, *RUN), FLOPS, COUNTED)
    validations = 1 + 2 + 1  # at the start, after steps 3 and 6, at the end
    assert live == Work(
        pairs=140,
        per_pair=44,
        training=140 * 44,
        caching=112 * 4 + 41 * 3,
        bank=0,
        validation=validations * 6 * 3 * 19,
    )
    assert live.total == live.training + 112 * 4 + 41 * 3 + validations * 6 * 3 * 19
    banked = work(settings(tmp_path, *RUN, "reference.bank=2", "data.flip=true"), FLOPS, COUNTED)
    assert (banked.per_pair, banked.training) == (35, 140 * 35)
    assert banked.bank == (50 * 2 + 6 * 3) * 9
    assert banked.caching == 2 * 112 * 4 + 41 * 3
    assert banked.validation == validations * 6 * 3 * 10
    seldom = work(settings(tmp_path, *RUN, "train.validate_every=null"), FLOPS, COUNTED)
    assert seldom.validation == 2 * 6 * 3 * 19
    several = work(settings(tmp_path, *RUN, "reference.bank=2"), FLOPS, COUNTED, 8)
    once = work(settings(tmp_path, *RUN, "reference.bank=2"), FLOPS, COUNTED)
    assert several == replace(once, pairs=8 * 140, training=8 * 140 * 35, processes=8)
    blind = work(settings(tmp_path, *RUN), FLOPS, Counted(None, None, None, None, False))
    assert (blind.caching, blind.bank, blind.validation, blind.total) == (None, None, None, 140 * 44)


def test_hours_and_money(settings: Settings, tmp_path: Path) -> None:
    whole = Work(pairs=10, per_pair=10**13, training=10**14, caching=10**14, bank=0, validation=0)
    config = settings(tmp_path, "train.precision=bf16")
    rows = {row["gpu"]: row for row in on_gpus(config, whole, 23 * 2**30, 0.5, {"A100": 7.2})}
    assert rows["A100"]["comparisons_per_second"] == pytest.approx(15.6)
    assert rows["A100"]["hours"] == pytest.approx(2 / 1.56 / 3600)
    assert rows["A100"]["usd"] == pytest.approx(2 / 1.56 / 500)
    assert rows["H100"]["usd_per_hour"] == GPUS["H100"].usd_per_hour
    assert {name: row["fits"] for name, row in rows.items()} == {"H100": True, "A100": True, "4090": False}
    both = {row["gpu"]: row for row in on_gpus(config, replace(whole, processes=2), 23 * 2**30, 0.5, {"A100": 7.2})}
    one, two = rows["A100"], both["A100"]
    assert two == one | {"comparisons_per_second": 2 * one["comparisons_per_second"], "hours": one["hours"] / 2}
    exact = {row["gpu"]: row["peak_tflops"] for row in on_gpus(settings(tmp_path, "train.tf32=false"), whole, 0, 0.5, {})}
    assert exact == {"H100": 66.9, "A100": 19.5, "4090": 82.6}


@pytest.mark.parametrize(("efficiency", "prices"), [(0.0, {}), (1.5, {}), (0.3, {"H200": 1.0})])
def test_what_is_no_efficiency_or_gpu_is_refused(
    settings: Settings, tmp_path: Path, efficiency: float, prices: dict[str, float]
) -> None:
    whole = Work(1, 1, 1, 0, 0, 0)
    with pytest.raises(ConfigError, match=r"share of the GPU's peak|allowed: 4090, A100, H100"):
        on_gpus(settings(tmp_path), whole, 0, efficiency, prices)


@pytest.fixture
def bare(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint's settings, and nothing else of it."""
    wanted = shutil.ignore_patterns("*.safetensors", "*.txt", "*token*", "*vocab*")
    return shutil.copytree(folders["epsilon"], tmp_path / "bare", ignore=wanted)


def test_the_command_prints_a_page_or_its_data(
    settings: Settings, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.suffix for path in bare.rglob("*") if path.is_file()} == {".json"}
    path = tmp_path / "config.yaml"
    path.write_text(dump(settings(tmp_path / "run", f"model.checkpoint={bare}")))
    command = ["plan", str(path), "--set", "reference.bank=3", "objective.beta=1", "--price", "H100=2.5", "--efficiency", "0.2"]
    assert cli.main(command) == 0
    page = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"] + "\n" == page
    assert found == runs.plan(
        settings(tmp_path / "run", f"model.checkpoint={bare}", "reference.bank=3", "objective.beta=1"),
        efficiency=0.2,
        prices={"H100": 2.5},
    )
    for block in page.split("\n\n"):  # numbers stand below each other
        assert len({line.index("FLOP") for line in block.splitlines() if re.match(r"  .*\d [GTP]FLOP\b", line)}) <= 1
    flops = found["flops_per_comparison"]
    assert flops["configured"] == flops["with_bank"] < flops["cached"] < flops["re_encoded"]
    assert found["memory"]["total"] == sum(part["bytes"] for part in found["memory"]["parts"])
    assert found["run"]["epochs"] == pytest.approx(4 * 2 / 12)
    assert found["run"]["reference_forwards"] == {"live": 8, "per_draw": 12}
    assert "the bank takes 3 x 12 = 36 reference forwards instead of 8" in page
    assert re.search(r"with caches and a bank +[\d.]+ GFLOP  this configuration", page)
    assert page.count("warning: ") == len(found["warnings"]) == 3
    assert [row["gpu"] for row in found["gpus"]] == ["H100", "A100", "4090"]
    assert found["gpus"][0]["usd_per_hour"] == 2.5


def test_a_quantised_base_is_planned_without_the_package_that_quantises(
    settings: Settings, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what makes an import fail
    path = tmp_path / "config.yaml"
    path.write_text(dump(settings(tmp_path / "run", f"model.checkpoint={bare}", "train.precision=bf16")))
    found = {}
    for kind in ("null", "nf4"):
        assert cli.main(["plan", str(path), "--json", "--set", f"model.quantize={kind}"]) == 0
        found[kind] = json.loads(capsys.readouterr().out)
    whole, small = found["null"], found["nf4"]
    (frozen, less), *others = zip(whole["memory"]["parts"], small["memory"]["parts"], strict=True)
    assert (frozen["how"], less["how"]) == ("bfloat16", "bfloat16 and nf4")
    assert less["bytes"] < frozen["bytes"]
    assert all(one == other for one, other in others)
    caching = whole["memory"]["while_caching"] - small["memory"]["while_caching"]
    assert caching == frozen["bytes"] - less["bytes"] == whole["memory"]["total"] - small["memory"]["total"]
    assert all(small[part] == whole[part] for part in ("parameters", "flops_per_comparison", "run", "warnings"))
    command = ["plan", str(path), "--set", "model.quantize=nf4", "trainable.kind=full"]
    assert cli.main(command) == 2  # as align refuses it
    assert "quantised ones cannot move" in capsys.readouterr().err


def test_several_processes_see_more_in_less_time(
    settings: Settings, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    overrides = ("train.batch_size=4", "train.learning_rate=1e-4", "objective.beta=2000")
    path.write_text(dump(settings(tmp_path / "run", f"model.checkpoint={bare}", *overrides)))
    found = {}
    for count in ("1", "8"):
        assert cli.main(["plan", str(path), "--json", "--processes", count]) == 0
        found[count] = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found["1"]
    one, eight = found["1"], found["8"]
    assert ["a step sees 4 comparisons" in each for each in one["warnings"]] == [True]
    assert eight["warnings"] == []
    assert (eight["run"]["processes"], eight["run"]["comparisons_per_step"]) == (8, 32)
    assert eight["run"]["epochs"] == pytest.approx(8 * one["run"]["epochs"])
    assert (eight["memory"], eight["disk"]) == (one["memory"], one["disk"])
    assert eight["run"]["flops"]["training"] == 8 * one["run"]["flops"]["training"]
    assert all(eight["run"]["flops"][stage] == one["run"]["flops"][stage] for stage in ("caching", "bank", "validation"))
    for row, alone in zip(eight["gpus"], one["gpus"], strict=True):
        assert row["hours"] / alone["hours"] == pytest.approx(eight["run"]["flops"]["total"] / 8 / one["run"]["flops"]["total"])
        assert row["usd"] == pytest.approx(8 * row["hours"] * row["usd_per_hour"])
    for said in ("memory on each device", "4 steps of 32 comparisons over 8 processes = 128", "on 8 GPUs, each at 30% of its"):
        assert said in eight["summary"]
        assert said not in one["summary"]
    assert "on one GPU at 30% of its dense fp32 peak (an assumption" in one["summary"]


def test_a_model_in_the_hubs_cache_is_planned_by_its_settings(
    settings: Settings, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="someone/tiny is no file or folder here"):
        runs.plan(settings(tmp_path, "model.checkpoint=someone/tiny"))
    store, commit = tmp_path / "cache" / "models--someone--tiny", "0" * 39 + "1"
    shutil.copytree(bare, store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    found = runs.plan(settings(tmp_path, "model.checkpoint=someone/tiny", "train.batch_size=16", "train.learning_rate=1e-4"))
    assert found["model"]["checkpoint"] == "someone/tiny"
    assert found["model"]["family"] == "sd"
    assert "reference.bank=K would take K x 12 reference forwards instead of 64" in found["summary"]
    assert found["summary"].endswith("no setting is known to end badly")


def test_settings_that_build_nothing_are_named(settings: Settings, bare: Path, tmp_path: Path) -> None:
    (bare / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": [1]}')
    with pytest.raises(CheckpointError, match=r"has a unet of class UNet2DConditionModel, which cannot be built"):
        runs.plan(settings(tmp_path, f"model.checkpoint={bare}"))


def test_numbers_have_the_unit_that_suits() -> None:
    assert [size(n) for n in (None, 0, 1023, 1536, 5 * 2**40)] == ["not known", "0 B", "1,023 B", "1.50 KiB", "5.00 TiB"]
    assert [shown(n) for n in (None, 5 * 10**7, 2 * 10**12)] == ["not known", "0.05 GFLOP", "2.00 TFLOP"]
    assert [time(h) for h in (0.01, 0.5, 5, 48)] == ["36.0 s", "30.0 min", "5.0 h", "2.0 days"]
