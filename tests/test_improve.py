"""The improvement loop: what stages leave, that they can be stopped anywhere, and that it moves what it is asked to move."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from flowalign import cli, config, runs
from flowalign.data.pairs import sequential
from flowalign.device import make_accelerator
from flowalign.errors import CollapseError, ConfigError, NonFiniteError, RunError
from flowalign.evaluate.hacking import Signal
from flowalign.improve_settings import Calibrate, ImproveConfig, Select
from flowalign.runs.rounds import Loop, ahead, select_pairs
from flowalign.scoring.combine import WAYS
from flowalign.scoring.order import ORDERS
from flowalign.scoring.select import PICKERS
from flowalign.setup import Prepared, prepare
from flowalign.train.trainable import trained
from tests.conftest import schedulers, tiny_pipeline

LORA = "pytorch_lora_weights.safetensors"
LEFT = (LORA, "field.safetensors", "chain.json", "pairs.jsonl", "comparisons.jsonl", "plan.jsonl")
Make = Callable[..., ImproveConfig]

pytestmark = pytest.mark.usefixtures("one_thread")


def loops(checkpoint: Path, *, train: dict[str, Any], **own: Any) -> Make:
    """loop(output, "draw.images=3", ...): a tiny loop of a random model, of which settings besides these are `own`."""

    def make(output: Path, *overrides: str) -> ImproveConfig:
        tree: dict[str, Any] = {
            "model": {"checkpoint": str(checkpoint)},
            "rounds": 2,
            "rewards": ["colourfulness"],
            "objective": {"beta": 500.0},
            "trainable": {"rank": 4},
            "train": {"steps": 2, "batch_size": 2, "precision": "fp32", "device": "cpu"} | train,
            "hacking": {"policy": "off"},
            "output": str(output),
        }
        return config.parse_tree(ImproveConfig, tree | own, "test", overrides)

    return make


@pytest.fixture(scope="module")
def loop(folders: dict[str, Path]) -> Make:
    """Over two rounds, with a reward that only watches."""
    return loops(
        folders["epsilon"],
        train={"learning_rate": 1e-3, "log_every": 1},
        prompts=["a thing", "b thing", "c thing", "d thing", "e thing", "f thing"],
        held_out=2,
        draw={"prompts": 3, "images": 3, "steps": 2, "batch_size": 4},
        evaluate={"rewards": ["sharpness"]},
        hacking={"policy": "warn"},
    )


@pytest.fixture(scope="module")
def whole(loop: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.improve(loop(folder), progress=False)
    return folder


def left(run: Path) -> dict[str, bytes | str]:
    """What a loop leaves that two equal loops share: pictures, comparisons, weights, figures."""
    found: dict[str, bytes | str] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.suffix == ".png" or path.name in LEFT:
            found[name] = path.read_bytes()
        elif path.name in ("evaluation.json", "improve.json"):
            found[name] = path.read_text().replace(str(run), "RUN")
    return found


def assert_equal(run: Path, whole: Path) -> None:
    one, other = left(run), left(whole)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_stages_meet_at_files(whole: Path) -> None:
    for number in ("00", "01"):
        folder = whole / "rounds" / number
        for name in ("scores-calibrated.parquet", "pairs.jsonl", "comparisons.jsonl", "align/weights", "evaluation.json"):
            assert (folder / name).exists(), name
    about = json.loads((whole / "improve.json").read_text())
    assert [each["round"] for each in about["rounds"]] == [1, 2]
    assert {name: each["trained"] for name, each in about["base"]["measures"].items()} == {
        "colourfulness": True,
        "sharpness": False,
    }
    kept = whole / "rounds" / f"{about['best'] - 1:02d}" / "align" / "weights" / LORA
    assert (whole / "weights" / LORA).read_bytes() == kept.read_bytes()
    page = (whole / "report.html").read_text()
    assert page.count('<img src="data:') == 3 * 2  # base and two rounds of two prompts


def test_the_kept_weights_generate(whole: Path, tmp_path: Path) -> None:
    pictures = runs.generate(str(whole), ["a thing"], steps=1, out=tmp_path, progress=False)
    assert pictures["pictures"] == 1


def test_rounds_go_on_from_one_another(whole: Path, loop: Make) -> None:
    first, second = (Loop(loop(whole)).aligning(number).trainable.start for number in (0, 1))
    assert (first, second) == (None, str(whole / "rounds" / "00" / "align"))
    one, two = (load_file(whole / "rounds" / number / "align" / "weights" / LORA) for number in ("00", "01"))
    far = sum(float((two[name] - one[name]).square().sum()) for name in one) ** 0.5
    apart = sum(float(two[name].square().sum()) for name in one if "lora_B" in name) ** 0.5
    assert 0 < far < 2 * apart  # a second adapter from scratch would have other down-projections, far away


def test_seeds_are_recorded_and_nothing_is_encoded_again(whole: Path, loop: Make) -> None:
    rows = [json.loads(line) for line in (whole / "rounds" / "01" / "comparisons.jsonl").read_text().splitlines()]
    plan = {
        (row["prompt"], row["seed"])
        for row in map(json.loads, (whole / "rounds" / "01" / "pictures" / "plan.jsonl").read_text().splitlines())
    }
    assert rows
    assert {(row["prompt"], seed) for row in rows for seed in row["seed"]} <= plan
    entries = sorted((whole / "cache").glob("images-*/??/*.safetensors"))
    pictures = {path.read_bytes() for path in whole.rglob("pictures/*.png")}
    assert len(entries) == len(pictures)  # what was drawn, and nothing besides
    tree = Loop(loop(whole)).aligning(1)
    ready = prepare(tree, make_accelerator(tree, whole), progress=False)
    assert sorted((whole / "cache").glob("images-*/??/*.safetensors")) == entries
    batch = next(iter(sequential(ready.train, 2)))
    assert not batch.std.any()
    vae = ready.family._vae()
    decoded = vae.decode(batch.mean.flatten(0, 1) / vae.config.scaling_factor).sample.clamp(-1, 1)
    kept = ready.family.encode_images((decoded + 1) / 2).mean
    assert not torch.allclose(kept, batch.mean.flatten(0, 1), atol=1e-2)  # they are the sampler's, not an encoder's


def test_a_latent_decodes_to_its_picture(whole: Path, loop: Make) -> None:
    from flowalign.data.images import decode, fit

    tree = Loop(loop(whole)).aligning(1)
    ready = prepare(tree, make_accelerator(tree, whole), progress=False)
    row = json.loads((whole / "rounds" / "01" / "comparisons.jsonl").read_text().splitlines()[0])
    batch = next(iter(sequential(ready.train, 1)))
    vae = ready.family._vae()
    with torch.no_grad():
        pixels = (vae.decode(batch.mean[0] / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    for place, name in enumerate(row["images"]):
        picture = decode((whole / "rounds" / "01" / name).read_bytes())
        shown = torch.from_numpy(fit(picture, 32).copy()).float() / 255
        torch.testing.assert_close(pixels[place], shown, atol=1.5 / 255, rtol=0)


STAGES = ("score_base", "measure", "draw_round", "score_round", "select_pairs", "train_round", "_evaluated")


def stopped_after_every_stage(settings: ImproveConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a loop of two rounds that is interrupted after its first stage, its second, and so on, until it is finished."""
    done, allowed = list[str](), 0

    def stopping(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stage(*args: Any) -> Any:
            found = real(*args)
            done.append(name)
            if len(done) == allowed:
                raise KeyboardInterrupt
            return found

        return stage

    for name in STAGES:
        monkeypatch.setattr(verb_module(), name, stopping(name, getattr(verb_module(), name)))
    for allowed in range(1, 40):
        done.clear()
        result = runs.improve(settings, resume=allowed > 1, progress=False)
        if result["finished"]:
            break
        assert f"flowalign improve {settings.output} --resume" in result["summary"]
    assert set(done) == set(STAGES)
    assert allowed == len(done) + 1 == 14  # the base and its evaluation, then 5 and 6 stages


def test_stopped_after_every_stage_it_goes_on_as_if_it_had_not(
    whole: Path, loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after_every_stage(loop(tmp_path / "run"), monkeypatch)
    assert_equal(tmp_path / "run", whole)


def test_a_folder_in_use_is_refused(whole: Path, loop: Make) -> None:
    with pytest.raises(ConfigError, match="add --resume"):
        runs.improve(loop(whole), progress=False)


def verb_module() -> Any:
    return import_module("flowalign.runs.improvement")


def killed_at_many_instants(settings: ImproveConfig, path: Path) -> int:
    """Run a loop whose process is killed, each time a little later, until it is finished; how often. path: for its YAML."""
    kills = 0
    path.write_text(config.dump(settings))
    command = [sys.executable, "-m", "flowalign", "improve", str(path), "--resume", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for patience in range(9, 150, 7):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < patience:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills > 0
    assert process.returncode == 0
    return kills


@pytest.mark.slow
def test_killed_at_many_instants_it_ends_as_if_it_never_was(whole: Path, loop: Make, tmp_path: Path) -> None:
    killed_at_many_instants(loop(tmp_path / "run"), tmp_path / "improve.yaml")
    assert_equal(tmp_path / "run", whole)


@pytest.mark.slow
def test_pictures_drawn_ahead_are_those_of_a_policy_one_round_older(whole: Path, loop: Make, tmp_path: Path) -> None:
    settings = loop(tmp_path / "run", "draw.when=ahead", "rounds=2")
    runs.improve(settings, progress=False)
    about = json.loads((tmp_path / "run" / "improve.json").read_text())
    assert [each["staleness"] for each in about["rounds"]] == [0, 1]
    drawn = json.loads((tmp_path / "run" / "rounds" / "01" / "pictures" / "drawn.json").read_text())
    assert drawn == {"pictures": 9, "policy": settings.model.checkpoint, "stale": 1}
    assert "by a policy one round older" in (tmp_path / "run" / "report.html").read_text()
    mine = left(tmp_path / "run")
    both = [name for name in left(whole) if name.startswith("rounds/00") and name.endswith((LORA, "comparisons.jsonl"))]
    assert both
    assert [name for name in both if mine[name] != left(whole)[name]] == []  # the first round is the same
    assert ahead(Loop(settings), 1) is None  # all of it is drawn


@pytest.mark.slow
def test_references_potential_replay_and_stored_noise(loop: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ("reference.kind=start", "select.by=margin", "select.least=0", "select.order=potential", "select.draws=2")
    more = ("replay.rounds=1", "replay.share=0.5", "switches.noise=stored")
    result = runs.improve(loop(run, *overrides, *more), progress=False)
    assert result["finished"]
    counts = []
    for number in ("00", "01"):
        rows = [json.loads(line) for line in (run / "rounds" / number / "comparisons.jsonl").read_text().splitlines()]
        assert all("implicit_margin" in row for row in rows)
        counts.append(len(rows))
    assert counts == [4, 8]  # 0.4 of 3 x 3 pairs; and as many of the round before
    entries = list((run / "cache").glob("images-*/??/*.safetensors"))
    noise = [load_file(entry)["noise"] for entry in entries if "noise" in load_file(entry)]
    assert len(noise) >= 18
    settings = config.load(run / "rounds" / "01" / "align" / "config.yaml")
    assert settings.reference.kind == "start"
    assert config.load(run / "rounds" / "00" / "align" / "config.yaml").reference.kind == "auto"


def test_a_variant_is_the_models_and_not_what_a_round_wrote(loop: Make, tmp_path: Path) -> None:
    """The model's folder has nothing but the variant; the margins are asked of it, and round 1 writes whole weights."""
    model = tmp_path / "half"
    tiny_pipeline("epsilon", schedulers()["epsilon"]).save_pretrained(model, variant="fp16")
    given = (f"model={{checkpoint: {model}, variant: fp16}}", "trainable={kind: full}", "rounds=1", "train.steps=1")
    asked = ("select.by=margin", "select.least=0", "select.order=implicit", "select.draws=2")
    result = runs.improve(loop(tmp_path / "run", *given, *asked), progress=False)
    assert (result["finished"], result["best"]) == (True, 1)
    assert (tmp_path / "run" / "rounds" / "00" / "pairs-with-margins.jsonl").is_file()
    assert runs.generate(str(tmp_path / "run"), ["a"], steps=1, out=tmp_path / "out", progress=False)["pictures"] == 1


def test_a_revision_is_asked_for_margins_too(whole: Path, loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub id; a run folder is opened as it is, and says itself what its base is."""
    shutil.copytree(whole, tmp_path / "run")
    for number in ("00", "01"):
        (tmp_path / "run" / "rounds" / number / "comparisons.jsonl").unlink()
    made, opened = Loop(loop(tmp_path / "run", "model.revision=v2", "select.order=implicit")), []

    def opening(checkpoint: str, **how: Any) -> None:
        opened.append((checkpoint, how.get("revision")))
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("flowalign.runs.implicit"), "open_family", opening)
    for number in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            select_pairs(made, number)
    assert opened == [(made.model.checkpoint, "v2"), (str(tmp_path / "run" / "rounds" / "00" / "align"), None)]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["evaluate.rewards=[colourfulness]"], "judge by another model"),
        (["trainable.start=x"], "set by the loop"),
        (["best=beauty"], "which is not measured"),
        (["calibrate.weights={style: 1}"], "is no reward here"),
        (["held_out=6"], "hold fewer out"),
        (["switches.annotator_types=2"], "switches.annotator_types"),
        (["model=null"], "model.checkpoint is missing"),
        (["generator={url: 'http://a/v1', model: m}"], "generator is for fit=flow; weights can only be aligned"),
        (["flow.solve.steps=2"], "flow is for fit=flow"),
        (["select.by=frs", "select.ties=keep"], "ties is given, which frs does not read"),
    ],
)
def test_what_does_not_go_together_is_refused(loop: Make, tmp_path: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        runs.improve(loop(tmp_path / "run", *overrides), progress=False)
    assert not (tmp_path / "run" / "rounds").exists()


def test_a_judge_that_sees_through_a_rewards_tower_is_refused(root: Path, loop: Make, tmp_path: Path) -> None:
    samples = root / "samples" / "emoji"
    clip = f"{{name: clip, as: emoji_clip, model: {samples / 'emoji-clip'}}}"
    style = f"{{name: aesthetic, as: style, model: {samples / 'emoji-clip'}, weights: {samples}/emoji-clip/style.safetensors}}"
    with pytest.raises(ConfigError, match="looks through the model of the reward 'emoji_clip'"):
        runs.improve(loop(tmp_path / "run", f"rewards=[{clip}]", f"evaluate.rewards=[{style}]"), progress=False)


def test_other_settings_do_not_go_on_with_a_run(whole: Path, loop: Make) -> None:
    with pytest.raises(ConfigError, match="begun with another draw and train"):
        runs.improve(loop(whole, "draw.steps=3", "train.steps=3"), resume=True, progress=False)


def test_more_rounds_than_the_base_has_prompts_for_are_refused(loop: Make, tmp_path: Path) -> None:
    begun = tmp_path / "run"
    settings = loop(begun, "draw.prompts=1", "rounds=2")
    pictures = Loop(settings).base / "pictures"
    pictures.mkdir(parents=True)
    (begun / "config.yaml").write_text(config.dump(settings))
    (pictures / "plan.jsonl").write_text("".join(json.dumps(row.line()) + "\n" for row in Loop(settings).pool()))
    (pictures / "drawn.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"from round 3 on .* draw.prompts=1 gives .*; allowed: rounds up to 2"):
        runs.improve(loop(begun, "draw.prompts=1", "rounds=3"), resume=True, progress=False)
    assert not (begun / "rounds" / "00").exists()


def test_an_alarm_ends_the_loop_and_the_round_before_is_kept(
    loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are given, as no tiny model games a reward: the judge falls in round 2 while the reward rises."""
    real, seen = verb_module().measure, []

    def measured(*args: Any) -> Any:
        found, rounds = real(*args), len(seen)
        seen.append(found)
        scores = {"colourfulness": found.scores["colourfulness"] + 100 * rounds}
        scores["sharpness"] = found.scores["sharpness"] * 0 + [0.0, 0.1, 0.0, 0.1] - (rounds == 2)
        return type(found)(found.prompts, scores, found.features)

    monkeypatch.setattr(verb_module(), "measure", measured)
    result = runs.improve(loop(tmp_path / "run", "hacking.policy=stop", "rounds=3"), progress=False)
    assert result["finished"]
    assert len(result["rounds"]) == 2
    assert result["best"] == 1
    assert "The trained reward rises while sharpness falls" in result["stopped"]
    first = tmp_path / "run" / "rounds" / "00" / "align" / "weights" / LORA
    assert (tmp_path / "run" / "weights" / LORA).read_bytes() == first.read_bytes()
    assert "The loop was stopped." in (tmp_path / "run" / "report.html").read_text()
    assert runs.report(tmp_path / "run")["report"].endswith("report.html")


def test_under_warn_a_round_with_an_alarm_counts_whatever_ends_the_loop(
    whole: Path, loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best round has an alarm, and the one after it selects nothing."""
    real, select = verb_module()._evaluated, verb_module().select_pairs

    def evaluated(*args: Any) -> dict[str, Any]:
        found = real(*args)
        found["combined"]["value"] = float(found["round"])
        return found | {"signs": [asdict(Signal("collapse", True, "It collapses.", {}))] if found["round"] == 2 else []}

    def nothing(of: Loop, number: int) -> int:
        if number == 2:
            raise RunError("all are tied.")
        return select(of, number)

    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(verb_module(), "_evaluated", evaluated)
    monkeypatch.setattr(verb_module(), "select_pairs", nothing)
    result = runs.improve(loop(tmp_path / "run", "rounds=3"), resume=True, progress=False)
    assert (result["best"], result["stopped"]) == (2, "Round 3 selects no comparisons: all are tied.")
    second = tmp_path / "run" / "rounds" / "01" / "align" / "weights" / LORA
    assert (tmp_path / "run" / "weights" / LORA).read_bytes() == second.read_bytes()


def test_a_round_that_breaks_ends_the_loop_and_what_it_says_helps(
    whole: Path, loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, after = tmp_path / "run", Prepared.after
    shutil.copytree(whole, run)
    for name in ("align", "align.json", "evaluation", "evaluation.json"):
        path = run / "rounds" / "01" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def breaking(self: Prepared, step: int) -> None:
        after(self, step)
        next(iter(trained(self.policy).values())).data.fill_(float("nan"))

    monkeypatch.setattr(Prepared, "after", breaking)
    result = runs.improve(loop(run), resume=True, progress=False)
    assert result["finished"]
    assert (len(result["rounds"]), result["best"]) == (1, 1)
    assert result["stopped"].startswith("Round 2 could not be trained: ")
    assert "became NaN" in result["stopped"]
    assert "lower train.learning_rate" in result["stopped"]
    first = run / "rounds" / "00" / "align" / "weights" / LORA
    assert (run / "weights" / LORA).read_bytes() == first.read_bytes()
    ended = runs.improve(loop(run, "guard.policy=stop"), resume=True, progress=False)
    assert ended["stopped"].startswith("Round 2 collapsed: the guard ended the run")
    assert ended["best"] == 1
    monkeypatch.undo()
    (run / "improve.yaml").write_text(config.dump(loop(run)))
    command = ["improve", str(run / "improve.yaml"), "--resume", "--set"]
    assert cli.main([*command, "train.precision=bf16"]) == 2
    assert "goes on with the settings it has, but for best, flow, guard," in capsys.readouterr().err
    assert cli.main([*command, "guard.policy=warn", "train.learning_rate=1e-4"]) == 0
    about = json.loads((run / "improve.json").read_text())
    assert (len(about["rounds"]), about["stopped"]) == (2, None)
    assert config.load(run / "rounds" / "01" / "align" / "config.yaml").train.learning_rate == 1e-4


@pytest.mark.parametrize("error", [CollapseError, NonFiniteError])
def test_a_first_round_that_breaks_is_an_error(
    whole: Path, loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[RunError]
) -> None:
    def breaking(*_: Any) -> None:
        raise error("It broke.")

    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(verb_module(), "train_round", breaking)
    with pytest.raises(error, match=r"^It broke\.$"):
        runs.improve(loop(tmp_path / "run"), resume=True, progress=False)


def test_every_picker_order_and_way_to_combine_can_be_named() -> None:
    def choices(section: type[Any], name: str) -> set[str]:
        return set(get_args(section.model_fields[name].annotation))

    assert choices(Select, "by") == set(PICKERS)
    assert choices(Select, "order") == {"none", *ORDERS}
    assert choices(Calibrate, "by") == set(WAYS) - {"fused", "general"}  # which are models fitted on labels


def test_the_command_reads_a_configuration(loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "improve.yaml").write_text(config.dump(loop(tmp_path / "run")))
    calls: list[tuple[ImproveConfig, bool]] = []

    def improve(settings: ImproveConfig, *, resume: bool) -> dict[str, Any]:
        calls.append((settings, resume))
        return {"summary": "done"}

    monkeypatch.setattr(runs, "improve", improve, raising=False)
    assert cli.main(["improve", str(tmp_path / "improve.yaml"), "--set", "rounds=7", "--resume"]) == 0
    assert calls == [(loop(tmp_path / "run", "rounds=7"), True)]
    assert cli.main(["improve", str(tmp_path / "improve.yaml"), "--set", "roundz=7"]) == 2


def moved(run: Path, emoji: Path, weight: float) -> dict[str, Any]:
    tree = {
        "model": {"checkpoint": str(emoji / "tiny-sd")},
        "prompts": str(emoji / "preferences" / "fluent_over_noto-train.jsonl"),
        "held_out": str(emoji / "preferences" / "fluent_over_noto-held_out.jsonl"),
        "rounds": 1,
        "rewards": ["colourfulness"],
        "calibrate": {"weights": {"colourfulness": weight}},
        "draw": {"prompts": 24, "images": 4, "steps": 8, "guidance": 3.0, "batch_size": 24, "precision": "bf16"},
        "objective": {"beta": 400.0},
        "trainable": {"rank": 32},
        "train": {"steps": 18, "batch_size": 16, "learning_rate": 6e-4, "warmup_steps": 3, "device": "cpu"},
        "evaluate": {"prompts": 16},
        "hacking": {"policy": "off"},
        "output": str(run),
    }
    found = runs.improve(config.parse_tree(ImproveConfig, tree), progress=False)
    return found["rounds"][-1]["measures"]["colourfulness"]


@pytest.mark.slow
def test_it_moves_what_it_is_asked_to_move(emoji: Path, tmp_path: Path) -> None:
    """On held-out prompts; with the selection turned around, the other way."""
    towards, away = (moved(tmp_path / str(weight), emoji, weight) for weight in (1.0, -1.0))
    for measure in ("calibrated", "win_rate"):
        assert towards[measure]["low"] > 0.5 > away[measure]["high"], measure
