"""A loop whose policy is told weights: what pictures are judged by, what a round goes on from, what is measured and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowalign import cli, config, runs
from flowalign.align.steer import Steered
from flowalign.device import make_accelerator
from flowalign.errors import ConfigError
from flowalign.evaluate.pareto import hypervolume
from flowalign.families.steer import STEER
from flowalign.improve_settings import ImproveConfig
from flowalign.rng import Keyed, key
from flowalign.runs.rounds import Loop
from flowalign.scoring.steered import drawn_weights
from flowalign.scoring.table import read_table
from flowalign.setup import Prepared, prepare
from tests.test_improve import LORA, Make, assert_equal, left, loops, verb_module

Weights = tuple[tuple[str, float], ...]
OBJECTIVES = ("sharpness", "colourfulness")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loop(folders: dict[str, Path]) -> Make:
    """Told weights of two rewards, over two rounds."""
    return loops(
        folders["epsilon"],
        train={"learning_rate": 3e-2},
        prompts=["a thing", "b thing", "c thing", "d thing"],
        held_out=1,
        rewards=["colourfulness", "sharpness"],
        steer={"objectives": list(OBJECTIVES), "hidden": 8},
        draw={"prompts": 2, "images": 3, "weights": 2, "steps": 2, "batch_size": 12},
        replay={"rounds": 1, "share": 0.4},
    )


@pytest.fixture(scope="module")
def whole(loop: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runs.improve(loop(folder), progress=False)["finished"]
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def named(weights: dict[str, float]) -> Weights:
    return tuple(sorted((name, round(value, 9)) for name, value in weights.items()))


@pytest.mark.parametrize("number", [0, 1])
def test_pairs_are_the_best_and_worst_of_their_own_weights(whole: Path, number: int) -> None:
    folder = whole / "rounds" / f"{number:02d}"
    drawn = folder if number else whole / "rounds" / "base"
    weights = {(row["prompt"], row["seed"]): row["weights"] for row in lines(drawn / "pictures" / "plan.jsonl")}
    table = read_table(folder / "scores-calibrated.parquet")
    rates = {name: table.numbers(f"calibrated.{name}") for name in OBJECTIVES}
    groups: dict[tuple[str, Weights], list[tuple[float, str]]] = {}
    for place, row in enumerate(table.data.select(["prompt", "seed", "path"]).to_pylist()):
        told = weights[row["prompt"], row["seed"]]
        total = sum(told[name] * rates[name][place] for name in OBJECTIVES)
        groups.setdefault((row["prompt"], named(told)), []).append((total, Path(row["path"]).name))
    assert [len(each) for each in groups.values()] == [3] * 4
    pairs = lines(folder / "pairs.jsonl")
    assert len(pairs) == 4
    for pair in pairs:
        group = sorted(groups.pop((pair["prompt"], named(pair["objective_weights"]))))
        assert [Path(name).name for name in pair["images"]] == [group[-1][1], group[0][1]]
        assert pair["margin"] == pytest.approx(group[-1][0] - group[0][0])
        assert pair["scores"]["combined"] == pytest.approx([group[-1][0], group[0][0]])
    trained = lines(folder / "comparisons.jsonl")
    assert trained[:4] == pairs
    assert len(trained) == (4, 7)[number]
    first = lines(whole / "rounds" / "00" / "pairs.jsonl")
    assert all(row in first for row in trained[4:])  # replayed, with the weights of then


def test_draws_are_keyed_and_pictures_know_what_they_were_drawn_under(whole: Path, loop: Make) -> None:
    mine = Loop(loop(whole))
    for number in (0, 1):
        plan = mine.plan(number)
        assert plan == Loop(loop(whole)).plan(number)
        for prompt in {row.prompt for row in plan}:
            rows = [row.weights for row in plan if row.prompt == prompt]
            for draw in range(2):
                expected = drawn_weights(2, 1.0, prompt, draw, key(0, "weights", number))
                assert rows[3 * draw : 3 * draw + 3] == [dict(zip(OBJECTIVES, expected.tolist(), strict=True))] * 3
        more = Loop(loop(whole, "draw.weights=5")).plan(number)
        assert [row for row in more if row in plan] == plan  # whatever else is drawn
    other = Loop(loop(whole, "draw.seed=1", "draw.prompts=3")).plan(1)
    assert not {named(dict(row.weights or {})) for row in other} & {named(dict(row.weights or {})) for row in mine.plan(1)}
    plain = Loop(loop(whole, "steer=null")).plan(1)
    assert {(row.prompt, row.seed) for row in plain} <= {(row.prompt, row.seed) for row in mine.plan(1)}
    assert all(row.weights is None for row in plain)

    told = lines(whole / "rounds" / "01" / "pictures" / "metadata.jsonl")
    assert [row["weights"] for row in told] == [pytest.approx(row.weights, abs=1e-6) for row in mine.plan(1)]
    assert not any("weights" in row for row in lines(whole / "rounds" / "base" / "pictures" / "metadata.jsonl"))
    drawn = json.loads((whole / "rounds" / "01" / "pictures" / "drawn.json").read_text())
    assert drawn == {"pictures": 12, "policy": str(whole / "rounds" / "00" / "align"), "stale": 0}


def ready_for(settings: ImproveConfig, number: int) -> Prepared:
    tree = Loop(settings).aligning(number)
    return prepare(tree, make_accelerator(tree, Path(settings.output)), progress=False)


def test_a_round_begins_at_the_adapters_and_the_network_of_the_one_before(whole: Path, loop: Make) -> None:
    first, second = (load_file(whole / "rounds" / number / "align" / "weights" / STEER) for number in ("00", "01"))
    assert first["layers.4.weight"].any()
    assert not torch.equal(first["layers.4.weight"], second["layers.4.weight"])
    ready = ready_for(loop(whole), 1)
    assert isinstance(ready.policy, Steered)
    assert all(torch.equal(tensor, first[name]) for name, tensor in ready.policy.shift.state_dict().items())
    assert ready.at_start.self_test(ready.first_batch(), Keyed(0)) < 1e-3
    batch = next(ready.batches(0))
    with torch.no_grad():
        terms = ready.step.terms(batch, Keyed(0))
        x_t, target, t = ready.step.noised(batch, Keyed(0))
        base = ready.family.predict(ready.family.denoiser, x_t, t, ready.step.told(batch)) - target
    assert terms.reference_error is not None
    torch.testing.assert_close(terms.reference_error.flatten(), base.square().flatten(1).mean(1))  # told no weights
    assert (terms.policy_error - terms.reference_error).abs().max() > 1e-4
    about = json.loads(next((whole / "rounds" / "01" / "align" / "state").glob("step-*/about.json")).read_text())
    assert about["start"] == ready.about["start"] != ready_for(loop(whole, "steer=null"), 1).about["start"]


def test_a_start_that_was_steered_otherwise_is_refused(whole: Path, loop: Make) -> None:
    with pytest.raises(ConfigError, match=r"was steered with hidden 8 and steer\.hidden is 16; set what it"):
        ready_for(loop(whole, "steer.hidden=16"), 1)
    with pytest.raises(ConfigError, match="was steered with objectives"):
        ready_for(loop(whole, "steer.objectives=[colourfulness, sharpness]"), 1)
    assert isinstance(ready_for(loop(whole, "steer.dropout=0.5"), 1).policy, Steered)


def test_held_out_prompts_are_measured_under_a_grid_of_weights(whole: Path) -> None:
    about = json.loads((whole / "improve.json").read_text())
    base = read_table(whole / "rounds" / "base" / "evaluation" / "scores.parquet")
    for each in about["rounds"]:
        folder = whole / "rounds" / f"{each['round'] - 1:02d}" / "evaluation"
        rows, found = lines(folder / "pictures" / "metadata.jsonl"), each["reach"]
        assert found["objectives"] == ["colourfulness", "sharpness"]
        assert found["under"] == [dict(zip(OBJECTIVES, row, strict=True)) for row in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))]
        assert [row["weights"] for row in rows] == [told for told in found["under"] for _ in range(2)]
        assert [row["seed"] for row in rows] == [7, 8] * 3
        table, points = read_table(folder / "scores.parquet"), []
        for name in found["objectives"]:  # CaPO over the base's two pictures, at their spread
            theirs, ours = base.oriented(name), table.oriented(name).reshape(3, 2)
            slope = 1 / np.sqrt(2 * theirs.var(ddof=1))

            def rates(scores: np.ndarray, theirs: np.ndarray = theirs, slope: float = slope) -> np.ndarray:
                return (1 / (1 + np.exp(-slope * (scores[..., None] - theirs)))).mean(-1)

            points.append((rates(ours).mean(1), rates(theirs).min()))
            assert each["measures"][name]["calibrated"]["value"] == pytest.approx(rates(ours)[1].mean())  # under even weights
            assert each["measures"][name]["mean"] == pytest.approx(table.oriented(name)[2:4].mean())
        means, start = np.stack([mean for mean, _ in points], axis=1), np.array([low for _, low in points])
        assert [[one["value"] for one in point] for point in found["points"]] == [pytest.approx(row) for row in means.tolist()]
        assert found["hypervolume"]["value"] == pytest.approx(hypervolume(means, start))
        order = np.sign(means[0] - means[2]) * [-1, 1]  # the first weight is all sharpness
        for name, sign in zip(found["objectives"], order, strict=True):
            assert np.sign(found["steerability"][name]["value"]) in (sign, 0)
    evaluated = json.loads((whole / "rounds" / "01" / "evaluation.json").read_text())
    assert evaluated["reach"] == about["rounds"][1]["reach"]
    assert about["base"]["reach"]["under"] == []


def test_the_page_shows_fronts_and_a_prompt_across_the_weights(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    assert text.count('<img src="data:') == 3 + 3  # the base and two rounds under even weights, three weights of the kept one
    assert "The same seeds across the weights" in text
    assert ">colourfulness 0<br>sharpness 1<" in text
    assert 'aria-label="Hypervolume: policy from' in text
    assert 'aria-label="Fronts, colourfulness and sharpness: round 1 from' in text
    assert "Spearman’s ρ" in text
    assert "on held-out prompts under even weights." in text
    assert "the weights of their pictures" in text


def test_stopped_it_goes_on_as_if_it_had_not(whole: Path, loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = tmp_path / "run", verb_module().draw_round

    def stopping(*given: Any) -> None:
        real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verb_module(), "draw_round", stopping)
        assert not runs.improve(loop(run), progress=False)["finished"]
    assert runs.improve(loop(run), resume=True, progress=False)["finished"]
    assert_equal(run, whole)
    steered = [name for name in left(whole) if name.endswith(LORA)]
    for name in steered:
        one, other = (folder / Path(name).with_name(STEER) for folder in (run, whole))
        assert one.read_bytes() == other.read_bytes()
    assert len(steered) == 3  # of two rounds, and of the kept one


def test_what_is_kept_draws_under_weights_and_is_exported(whole: Path, tmp_path: Path) -> None:
    found = []
    for name, weights in (("one", {"sharpness": 1.0}), ("other", {"colourfulness": 2.0})):
        runs.generate(str(whole), ["a thing"], steps=1, out=tmp_path / name, weights=weights, progress=False)
        found.append((tmp_path / name / "00000-0.png").read_bytes())
    assert found[0] != found[1]
    best = json.loads((whole / "improve.json").read_text())["best"]
    out = {}
    for name, run in (("loop", whole), ("round", whole / "rounds" / f"{best - 1:02d}" / "align")):
        assert cli.main(["export", str(run), "--out", str(tmp_path / f"{name}.safetensors")]) == 0
        out[name] = (tmp_path / f"{name}.safetensors").read_bytes()
    assert out["loop"] == out["round"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["steer.condition=scores"], "a loop judges its own by weights, so set steer.condition=weights"),
        (["steer.objectives=[sharpness, style]"], "steer.objectives names 'style', which is no reward here"),
        (["reference.kind=start"], "reference.kind 'start' is a policy of the loop"),
        (["train.compile=true"], "train.compile compiles a denoiser that is called by itself"),
        (["reference.kind=ema"], "told no weights; set reference.kind=auto"),
        (["select.by=frs"], "which select.by does not go with"),
        (["select.order=potential"], "which select.order=potential does not go with"),
        (["calibrate.weights={sharpness: 2}"], "which calibrate.by or weights does not go with"),
        (["steer=null", "rewards=[sharpness]", "best=hypervolume"], "best is 'hypervolume', which is not measured"),
    ],
)
def test_what_does_not_go_together_is_refused(loop: Make, tmp_path: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        runs.improve(loop(tmp_path / "run", *overrides), progress=False)
    assert not (tmp_path / "run" / "rounds").exists()


def test_an_even_number_of_weights_is_refused(loop: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it must be odd, so that even weights are among them"):
        loop(tmp_path, "evaluate.weights=4")


@pytest.mark.slow
def test_drawn_ahead_the_base_is_told_nothing_and_judged_by_the_weights(whole: Path, loop: Make, tmp_path: Path) -> None:
    runs.improve(loop(tmp_path / "run", "draw.when=ahead", "rounds=3", "best=hypervolume"), progress=False)
    rounds = tmp_path / "run" / "rounds"
    assert not any("weights" in row for row in lines(rounds / "01" / "pictures" / "metadata.jsonl"))
    assert all("weights" in row for row in lines(rounds / "02" / "pictures" / "metadata.jsonl"))
    assert all("objective_weights" in row for row in lines(rounds / "01" / "comparisons.jsonl"))
    both = [rounds / "00" / "align" / "weights" / STEER, whole / "rounds" / "00" / "align" / "weights" / STEER]
    assert both[0].read_bytes() == both[1].read_bytes()  # the first round is the same
    about = json.loads((tmp_path / "run" / "improve.json").read_text())
    volumes = [each["reach"]["hypervolume"]["value"] for each in about["rounds"]]
    assert about["best"] == 1 + volumes.index(max(volumes))


@pytest.mark.slow
def test_pictures_move_to_what_their_weights_ask_for(emoji: Path, tmp_path: Path) -> None:
    """Of two rewards that pull apart, on held-out prompts; with the weights turned around, the other way."""
    tower = str(emoji / "emoji-clip")
    tree = {
        "model": {"checkpoint": str(emoji / "tiny-sd")},
        "prompts": str(emoji / "preferences" / "fluent_over_noto-train.jsonl"),
        "held_out": str(emoji / "preferences" / "fluent_over_noto-held_out.jsonl"),
        "rounds": 1,
        "rewards": ["jpeg_size", {"name": "aesthetic", "as": "style", "model": tower, "weights": f"{tower}/style.safetensors"}],
        "steer": {"objectives": ["style", "jpeg_size"]},
        "draw": {"prompts": 24, "weights": 2, "alpha": 0.3, "steps": 8, "guidance": 3, "batch_size": 24, "precision": "bf16"},
        "objective": {"beta": 400.0},
        "trainable": {"rank": 32},
        "train": {"steps": 40, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 3, "device": "cpu"},
        "evaluate": {"prompts": 12},
        "guard": {"policy": "off"},
        "hacking": {"policy": "off"},
        "output": str(tmp_path / "run"),
    }
    found = runs.improve(config.parse_tree(ImproveConfig, tree), progress=False)["rounds"][-1]["reach"]
    assert [each["style"] for each in found["under"]] == [1.0, 0.5, 0.0]
    first, _, last = (dict(zip(found["objectives"], point, strict=True)) for point in found["points"])
    assert first["style"]["low"] > last["style"]["high"]
    assert last["jpeg_size"]["low"] > first["jpeg_size"]["high"]
    assert {name: each["value"] for name, each in found["steerability"].items()} == {"style": 1.0, "jpeg_size": 1.0}
