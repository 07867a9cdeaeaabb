"""Fitting, applying and comparing flows by the commands' own functions: files, resume, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from flowalign import cli, config, runs
from flowalign.data.readers import open_comparisons
from flowalign.errors import ConfigError, DataError, FlowalignError
from flowalign.flow.arrays import ArrayPairs
from flowalign.flow.field import FieldSettings, load_field, make_field
from flowalign.flow.improve import load_flow
from flowalign.flow.settings import FlowConfig, Match, Scores, Train
from flowalign.runs.flow_pairs import write_pairs
from flowalign.scoring.rewards.base import Card
from flowalign.scoring.table import ScoreTable

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., FlowConfig]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / "field.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in found]


def test_a_run_leaves_what_runs_leave(flow_run: Path) -> None:
    names = {path.name for path in flow_run.iterdir()}
    assert names == {
        "config.yaml", "weights", "state", "metrics.jsonl", "environment.json", "data.json", "bad_rows.jsonl", "samples",
        "report.html",
    }  # fmt: skip
    assert {path.name for path in (flow_run / "weights").iterdir()} == {
        "field.json", "field.safetensors", "domain.safetensors", "README.md", "samples.png",
    }  # fmt: skip
    settings = config.load_tree(FlowConfig, flow_run / "config.yaml")
    assert config.parse_tree(FlowConfig, json.loads(settings.model_dump_json())) == settings
    metrics = lines(flow_run)
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 4]
    assert metrics[-1]["eval/flow/error"] < metrics[0]["eval/flow/error"]  # 4 steps at a high rate
    assert metrics[0]["eval/flow/error"] == metrics[0]["eval/flow/power"]  # it starts as nothing
    assert "flow apply" in (flow_run / "weights" / "README.md").read_text()
    assert json.loads((flow_run / "data.json").read_text())["train"]["comparisons"] == 12


def test_a_stopped_run_resumes_to_the_same_weights(flow_settings: Make, flow_run: Path, tmp_path: Path) -> None:
    part = flow_settings(tmp_path / "run", "train.save_every=2")
    half = part.model_copy(update={"train": part.train.model_copy(update={"steps": 2})})
    runs.fit_flow(half, progress=False)
    with pytest.raises(ConfigError, match=r"already holds a run"):
        runs.fit_flow(part, progress=False)
    runs.fit_flow(part, resume=True, progress=False)
    assert same(tmp_path / "run", flow_run)
    told = [line for line in lines(tmp_path / "run") if "train/loss" in line]
    assert told == [line for line in lines(flow_run) if "train/loss" in line]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(flow_settings: Make, tmp_path: Path) -> None:
    """kill -9 at a moment of nobody's choosing."""
    settings = ("train.steps=60", "train.save_every=3", "train.log_every=1")
    runs.fit_flow(flow_settings(tmp_path / "whole", *settings), progress=False)
    path, out = tmp_path / "flow.yaml", tmp_path / "killed"
    path.write_text(config.dump(flow_settings(out, *settings)))
    command = [sys.executable, "-m", "flowalign", "flow", "fit"]
    process = subprocess.Popen([*command, str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((out / "state").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "weights").exists(), "it was through before it was killed"
    assert cli.main(["flow", "fit", str(out), "--resume"]) == 0
    assert same(out, tmp_path / "whole")
    assert lines(out) == lines(tmp_path / "whole")


def test_other_settings_do_not_resume(flow_settings: Make, tmp_path: Path) -> None:
    runs.fit_flow(flow_settings(tmp_path / "run"), progress=False)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(FlowalignError, match=r"belongs to a run with other settings: .*sigma"):
        runs.fit_flow(flow_settings(tmp_path / "run", "match.sigma=0.5", "train.steps=8"), resume=True, progress=False)
    with pytest.raises(ConfigError, match=r"train\.steps is 3, and .* has trained 4 steps already"):
        runs.fit_flow(flow_settings(tmp_path / "run", "train.steps=3"), resume=True, progress=False)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "overrides",
    [
        ("space.kind=pixels", "context.kind=none", "model=null", "train.accumulation=2"),
        ("space.kind=pixels", "context.kind=class", "model=null", "match.coupling=ot_per_context"),
        ("data.flip=true", "match.coupling=ot", "train.precision=bf16", "train.ema=null"),
        ("data.validation=null", "data.held_out=0.4", "match.coupling=independent", "solve.guidance=2"),
    ],
    ids=["pixels", "classes", "flips", "split"],
)
def test_other_kinds_of_flows(flow_settings: Make, overrides: tuple[str, ...], tmp_path: Path) -> None:
    from tests.flow.test_improve import folder_of

    runs.fit_flow(flow_settings(tmp_path / "run", "domain.quantile=null", *overrides), progress=False)
    source = folder_of(tmp_path / "in")
    told = runs.apply_flow(str(tmp_path / "run"), source, out=tmp_path / "out", device="cpu", progress=False)
    assert told["pictures"] == 3
    assert told["evaluations"] == 4


def test_accumulated_steps_are_larger_steps(flow_settings: Make, tmp_path: Path) -> None:
    for name, each in {"one": (4, 1), "two": (2, 2)}.items():
        batch, micro = f"train.batch_size={each[0]}", f"train.accumulation={each[1]}"
        runs.fit_flow(flow_settings(tmp_path / name, batch, micro), progress=False)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


def table_of(folder: Path, scores: dict[str, list[float | None]], rewards: tuple[str, ...] = ("r",)) -> Path:
    """A score table of drawings of the votes' kind; `scores` per prompt."""
    from tests.flow.test_improve import picture

    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for prompt, values in scores.items():
        for value in values:
            path = folder / f"{len(rows)}.png"
            picture(len(rows), (32, 32)).save(path)
            row = {"image": path.name, "path": str(path), "prompt": prompt, "generator": "g", "seed": len(rows)}
            rows.append(row | {f"raw.{name}": value for name in rewards})
    card = dict(title="", range=(0.0, 1.0), licence="", source="", weights="none", reads_prompt=False, differentiable=False)
    cards = {name: Card(name=name, better="lower" if name == "low" else "higher", fingerprint="f", **card) for name in rewards}
    ScoreTable(pa.Table.from_pylist(rows), cards).write(folder / "scores.parquet")
    return folder / "scores.parquet"


def test_pairs_from_scores_are_the_best_and_worst_of_n(tmp_path: Path) -> None:
    made = np.random.default_rng(0)
    scores = {f"{letter} thing": [float(x) for x in made.random(7)] for letter in "abc"} | {"alone": [0.5], "tie": [0.2, 0.2]}
    table = table_of(tmp_path / "t", scores)
    assert write_pairs(Scores(table=str(table)), tmp_path / "all.jsonl", seed=0) == 3
    whole = open_comparisons(tmp_path / "all.jsonl")
    for place, (prompt, values) in enumerate(list(scores.items())[:3]):
        pair = whole[place]
        assert pair.prompt == prompt
        assert pair.scores == {"combined": (max(values), min(values))}
        assert [Path(image.name).name for image in pair.images] == [f"{each}.png" for each in pair.seed or ()]
        assert pair.seed == tuple(7 * place + values.index(pick(values)) for pick in (max, min))
    assert write_pairs(Scores(table=str(table), n=3), tmp_path / "three.jsonl", seed=0) == 6  # of 7: one is left
    three = open_comparisons(tmp_path / "three.jsonl")
    used = [seed for pair in three for seed in pair.seed or ()]
    assert len(set(used)) == len(used) == 12
    low = table_of(tmp_path / "low", {"x": [0.1, None, 0.9]}, ("low",))
    write_pairs(Scores(table=str(low), reward="low"), tmp_path / "low.jsonl", seed=0)
    assert open_comparisons(tmp_path / "low.jsonl")[0].seed == (0, 2)  # lower is better, and what has no score does not count


def test_pairs_from_scores_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prompt with two pictures of different scores"):
        write_pairs(Scores(table=str(table_of(tmp_path / "t", {"x": [0.2, 0.2]}))), tmp_path / "p.jsonl", seed=0)
    two = str(table_of(tmp_path / "two", {"x": [0.2, 0.3]}, ("a", "b")))
    with pytest.raises(ConfigError, match=r"set scores.reward to one of a, b"):
        write_pairs(Scores(table=two), tmp_path / "p.jsonl", seed=0)
    with pytest.raises(ConfigError, match=r"'c' is not in .* allowed: a, b"):
        write_pairs(Scores(table=two, reward="c"), tmp_path / "p.jsonl", seed=0)


def test_a_flow_is_fitted_to_a_score_table(flow_settings: Make, tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", {f"{letter} thing": [0.1 * n for n in range(4)] for letter in "abcdef"})
    made = ("data.train=''", "data.validation=null", f"scores.table={table}", "scores.n=2")
    runs.fit_flow(flow_settings(tmp_path / "run", *made), progress=False)
    assert len((tmp_path / "run" / "pairs.jsonl").read_text().splitlines()) == 12
    assert load_flow(tmp_path / "run").contexts.kind == "tokens"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.train=''",), "set either data.train, .* or scores.table"),
        (("model=null",), "space.kind 'latents' needs an autoencoder"),
        (("model=null", "space.kind=pixels"), "context.kind 'prompt' needs model.checkpoint"),
        (("data.resolution=18",), "data.resolution is 18; .* needs a multiple of 4, for example 16"),
        (("data.resolution=null", "space.kind=pixels"), "data.resolution is missing"),
        (("model.checkpoint=nowhere/at/all",), "nowhere/at/all"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(
    flow_settings: Make, overrides: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    with pytest.raises(FlowalignError, match=says) as caught:
        runs.fit_flow(flow_settings(tmp_path / "run", *overrides), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("match.sigm=0.1", "match.sigm is not a setting; did you mean 'sigma'"),
        ("match.coupling=otpc", "match.coupling cannot be 'otpc'"),
        ("solve.strength=1.5", "solve.strength cannot be 1.5"),
        ("learning_rate=1", "learning_rate is not a setting; did you mean train.learning_rate"),
        ("field.width=12", "field.width cannot be 12"),
    ],
)
def test_settings_of_a_flow_are_checked_as_all_are(flow_settings: Make, override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        flow_settings(tmp_path, override)


def test_the_command_line(flow_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.flow.test_improve import folder_of

    source, run = str(folder_of(tmp_path / "in")), str(flow_run)
    apply = ["flow", "apply", run, source, "--out", str(tmp_path / "out")]
    assert cli.main([*apply, "--strength", "0.5", "--diagnose", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["pictures"] == 3
    assert 0 < told["strength"] <= 0.5
    assert told["error"] >= 0
    for wrong in (["flow"], ["flow", "fly"], ["flow", "apply", run, source]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(wrong)
        assert stopped.value.code == 2
    assert cli.main([*apply, "--strength", "2"]) == 2
    assert "strength cannot be 2" in capsys.readouterr().err
    assert cli.main(["flow", "fit", run]) == 2
    assert cli.main(["flow", "apply", str(tmp_path), source, "--out", str(tmp_path / "o")]) == 2
    assert "holds no field" in capsys.readouterr().err
    assert cli.main(["flow", "evaluate", run, source]) == 2
    assert "add --judges FOLDER" in capsys.readouterr().err


def test_generate_moves_what_it_draws(flow_run: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    from flowalign.flow.folders import list_pictures

    drawn = dict(steps=1, guidance=1.0, device="cpu", progress=False)
    told = runs.generate(str(folders["epsilon"]), ["a thing"], seeds=[0, 1], out=tmp_path, flow=str(flow_run), **drawn)
    assert told["pictures"] == 2
    before, after = list_pictures(tmp_path / "before"), list_pictures(tmp_path)
    assert [each.file_name for each in before] == [each.file_name for each in after]
    assert all("+ flow" in each.row["generator"] and each.row["steps"] == 1 for each in after)
    assert all((np.asarray(a.read()) != np.asarray(b.read())).any() for a, b in zip(before, after, strict=True))


def test_a_field_of_tensors_is_fitted_in_a_folder_and_resumes(tmp_path: Path) -> None:
    start = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    pairs, settings = ArrayPairs(start, start + 1), FieldSettings((3,), width=16, levels=2)
    cfg = Train(steps=6, batch_size=8, save_every=3, log_every=3, device="cpu")
    whole, halved = make_field(settings, 0), make_field(settings, 0)
    told = runs.fit_field(whole, pairs, tmp_path / "whole", cfg, Match(), held_out=pairs, progress=False)
    assert told["metrics"]["eval/flow/error"] < 1
    first = cfg.model_copy(update={"steps": 3})
    runs.fit_field(halved, pairs, tmp_path / "half", first, Match(), held_out=pairs, progress=False)
    with pytest.raises(ConfigError, match=r"already holds a run"):
        runs.fit_field(halved, pairs, tmp_path / "half", cfg, Match(), progress=False)
    again = make_field(settings, 0)
    runs.fit_field(again, pairs, tmp_path / "half", cfg, Match(), held_out=pairs, resume=True, progress=False)
    assert same(tmp_path / "half", tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"train\.steps is 3, and .* has trained 6 steps already"):
        runs.fit_field(again, pairs, tmp_path / "half", first, Match(), resume=True, progress=False)
    kept = load_field(tmp_path / "whole" / "weights")
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), whole.state_dict().values(), strict=True))


def test_a_fit_that_is_stopped_before_it_began_says_how_it_goes_on(
    flow_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("flowalign.runs.flows"), "prepare_flow", stopping)
    found = runs.fit_flow(flow_settings(tmp_path / "run"), progress=False)
    assert not found["finished"]
    assert found["summary"].endswith("Continue with the same command.")
