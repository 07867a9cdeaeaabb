"""The improvement loop of a generator that nobody can look into: each round fits a flow, and flows are applied in turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowalign
from flowalign import config, runs
from flowalign.errors import ConfigError, RunError
from flowalign.flow.folders import list_pictures
from flowalign.flow.improve import Chain, load_flow
from flowalign.flow.settings import FlowConfig, Solve
from flowalign.improve_settings import ImproveConfig
from tests.serve.upstream import Asked, Upstream, encoded, gradient, reply, running
from tests.test_improve import assert_equal, killed_at_many_instants, stopped_after_every_stage

Make = Callable[..., ImproveConfig]

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = 4 * 3 + 2 * 2 + 3 * 3
"""That the base draws of the prompts of both rounds, that it draws of held-out ones, and of the second round."""
KEY = "FLOWALIGN_TEST_KEY"


class Seeded(Upstream):
    """It draws another picture for each seed."""

    def pictures(self, asked: Asked) -> list[bytes]:
        return [encoded(gradient(asked.json()["prompt"], asked.json()["seed"], (24, 24)))]

    def wanted(self) -> list[tuple[str, int]]:
        return [(each.json()["prompt"], each.json()["seed"]) for each in self.asked]


@pytest.fixture(scope="module")
def api() -> Iterator[Seeded]:
    with running(Seeded()) as made:
        yield made


def as_new(api: Seeded) -> None:
    api.asked.clear()
    api.answer = None


@pytest.fixture(autouse=True)
def not_asked_yet(api: Seeded) -> None:
    as_new(api)


@pytest.fixture(scope="module")
def loop(api: Seeded) -> Make:
    """loop(output, "flow.train.steps=3", ...): a tiny loop of flows between pixels, behind the API, over two rounds."""

    def make(output: Path, *overrides: str) -> ImproveConfig:
        tree: dict[str, Any] = {
            "fit": "flow",
            "generator": {"url": api.url, "model": "gradient", "seed_field": "seed", "retries": 0},
            "prompts": ["a thing", "b thing", "c thing", "d thing", "e thing", "f thing"],
            "held_out": 2,
            "rounds": 2,
            "rewards": ["colourfulness"],
            "draw": {"prompts": 3, "images": 3, "resolution": 16},
            "flow": {
                "space": {"kind": "pixels"},
                "context": {"kind": "none"},
                "field": {"width": 8, "levels": 2},
                "train": {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "ema": None, "device": "cpu"},
                "solve": {"steps": 1, "batch_size": 4},
                "domain": {"quantile": None},
            },
            "evaluate": {"rewards": ["sharpness"]},
            "hacking": {"policy": "warn"},
            "output": str(output),
        }
        return config.parse_tree(ImproveConfig, tree, "test", overrides)

    return make


@pytest.fixture(scope="module")
def whole(loop: Make, api: Seeded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop that nothing happened to; what it asked the API for is in `asked.json` beside."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    as_new(api)
    runs.improve(loop(folder), progress=False)
    (folder.parent / "asked.json").write_text(json.dumps(api.wanted()))
    return folder


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(each.read()) for each in list_pictures(folder)]


def moved(flow: Any, folder: Path) -> list[np.ndarray]:
    return [np.asarray(each) for each in flow.apply([each.read() for each in list_pictures(folder)]).pictures]


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_each_round_fits_a_flow_to_what_the_flows_before_it_moved(whole: Path) -> None:
    first, second = whole / "rounds" / "00", whole / "rounds" / "01"
    for folder in (first, second):
        for name in ("comparisons.jsonl", "flow/weights/field.safetensors", "flow.json", "chain.json", "evaluation.json"):
            assert (folder / name).exists(), name
        assert not (folder / "align").exists()
    assert json.loads((second / "chain.json").read_text()) == {"flows": ["../00/flow", "flow"]}
    one, both = load_flow(first), load_flow(second)
    assert [len(each.flows) for each in (one, both)] == [1, 2]  # type: ignore[union-attr]
    assert equal(pixels(second / "pictures"), moved(one, second / "pictures" / "before"))
    assert not equal(pixels(second / "pictures"), pixels(second / "pictures" / "before"))
    rows = [json.loads(line) for line in (second / "comparisons.jsonl").read_text().splitlines()]
    assert {Path(name).parent.as_posix() for row in rows for name in row["images"]} == {"pictures"}
    for folder, chain in ((first, one), (second, both)):  # held out, both move what the base drew
        after = pixels(folder / "evaluation" / "pictures")
        assert equal(after, moved(chain, whole / "rounds" / "base" / "evaluation" / "pictures"))
    once = moved(load_flow(second / "flow"), first / "evaluation" / "pictures")
    assert equal(once, pixels(second / "evaluation" / "pictures"))


def test_what_is_kept_is_the_chain_after_the_best_round(whole: Path, tmp_path: Path) -> None:
    about = json.loads((whole / "improve.json").read_text())
    names = [f"rounds/{number:02d}/flow" for number in range(about["best"])]
    assert (about["fit"], about["objective"], about["flows"]) == ("flow", "flow matching", names)
    assert about["checkpoint"].startswith("gradient at http://127.0.0.1:")
    assert {name: each["trained"] for name, each in about["base"]["measures"].items()} == {
        "colourfulness": True,
        "sharpness": False,
    }
    copied = tmp_path / "elsewhere"
    shutil.copytree(whole / "weights", copied / "weights")  # it needs no round
    base = whole / "rounds" / "base" / "evaluation" / "pictures"
    kept = whole / "rounds" / f"{about['best'] - 1:02d}"
    assert equal(moved(load_flow(copied), base), moved(load_flow(kept), base))
    page = (whole / "report.html").read_text()
    assert page.count('<img src="data:') == 3 * 2  # base and two rounds of two prompts
    assert "a flow each round" in page


def test_every_command_takes_the_kept_chain(whole: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    told = runs.generate(
        str(folders["epsilon"]), ["a thing"], steps=1, out=tmp_path, flow=str(whole), device="cpu", progress=False
    )
    assert told["pictures"] == 1
    assert not equal(pixels(tmp_path), pixels(tmp_path / "before"))
    base = whole / "rounds" / "base" / "evaluation" / "pictures"
    pictures = [each.read() for each in list_pictures(base)]
    better = flowalign.wrap(lambda prompts, seeds: pictures[: len(prompts)], whole)
    assert equal([np.asarray(each) for each in better(["a thing"], [0])], moved(load_flow(whole), base)[:1])
    assert better.with_strength(0.0)(["a thing"], [0])[0].tobytes() == pictures[0].tobytes()


def test_a_chain_says_of_a_picture_the_worst_of_its_flows(whole: Path) -> None:
    chain = load_flow(whole / "rounds" / "01")
    assert isinstance(chain, Chain)
    pictures = [each.read() for each in list_pictures(whole / "rounds" / "base" / "evaluation" / "pictures")]
    found = chain.apply(pictures, diagnose=True, solve=Solve(steps=1, strength=0.5, solver="euler"))
    assert found.strength == [0.5] * 4
    assert (found.limit, found.distance) == (None, [None] * 4)
    assert found.evaluations == 2
    parts, now = [], pictures
    for flow in chain.flows:
        parts.append(flow.apply(now, diagnose=True, solve=Solve(steps=1, strength=0.5, solver="euler")))
        now = parts[-1].pictures
    assert found.error == [max(pair) for pair in zip(*(each.error or [] for each in parts), strict=True)]


def test_no_picture_is_asked_for_twice(
    whole: Path, loop: Make, api: Seeded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = json.loads((whole.parent / "asked.json").read_text())
    assert len(asked) == len({(prompt, seed) for prompt, seed in asked}) == PICTURES
    stopped_after_every_stage(loop(tmp_path / "run"), monkeypatch)
    assert_equal(tmp_path / "run", whole)
    assert sorted(api.wanted()) == sorted(map(tuple, asked))


def test_an_api_that_fails_in_between_is_asked_for_the_rest(whole: Path, loop: Make, api: Seeded, tmp_path: Path) -> None:
    drawn = list[tuple[str, int]]()

    def failing(asked: Asked) -> bytes:
        if len(drawn) == 7:
            return reply({"error": {"message": "no credit left"}}, status=402)
        drawn.append((asked.json()["prompt"], asked.json()["seed"]))
        return api.answered(asked)

    api.answer = failing
    with pytest.raises(RunError, match="402: no credit left"):
        runs.improve(loop(tmp_path / "run"), progress=False)
    assert len(list((tmp_path / "run").rglob("*.png"))) == 7
    api.answer = None
    api.asked.clear()
    slower = loop(tmp_path / "run", "generator.parallel=1", "generator.retries=2")  # how it is asked may change
    assert runs.improve(slower, resume=True, progress=False)["finished"]
    assert_equal(tmp_path / "run", whole)
    assert len(api.asked) == PICTURES - 7
    assert not set(drawn) & set(api.wanted())
    with pytest.raises(ConfigError, match="begun with another generator"):
        runs.improve(loop(tmp_path / "run", "generator.model=other"), resume=True, progress=False)


def test_the_key_comes_from_the_environment_and_stays_there(
    loop: Make, api: Seeded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ConfigError, match=f"environment variable {KEY}, which is not set"):
        runs.improve(loop(tmp_path / "run", f"generator.key={KEY}"), progress=False)
    assert api.asked == []
    monkeypatch.setenv(KEY, "sk-secret")
    runs.improve(loop(tmp_path / "run", f"generator.key={KEY}", "rounds=1"), progress=False)
    assert {each.headers["authorization"] for each in api.asked} == {"Bearer sk-secret"}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"sk-secret" in path.read_bytes()]


def test_a_checkpoint_may_draw_and_a_flow_be_told_prompts(loop: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    model = ("generator=null", f"model.checkpoint={folders['epsilon']}", "draw.steps=1", "draw.resolution=null", "rounds=1")
    flow = ("flow.space.kind=latents", "flow.context.kind=prompt", "flow.train.seed=3")
    result = runs.improve(loop(tmp_path / "run", *model, *flow), progress=False)
    assert (result["finished"], result["best"], result["checkpoint"]) == (True, 1, str(folders["epsilon"]))
    fitted = config.load_tree(FlowConfig, tmp_path / "run" / "rounds" / "00" / "flow" / "config.yaml")
    assert (fitted.space.kind, fitted.solve.steps, fitted.train.steps) == ("latents", 1, 3)
    assert fitted.train.seed != 3  # a round has its own
    assert load_flow(tmp_path / "run").reads_prompts
    assert not list((tmp_path / "run" / "cache").glob("images-*/**/*noise*"))
    assert not (tmp_path / "run" / "encoders.json").exists()  # nothing is kept for training weights


def test_prompts_may_hold_what_splits_lines_elsewhere(loop: Make, api: Seeded, tmp_path: Path) -> None:
    odd = ["a\u2028thing", "b\u2029thing", "c\x85thing", "d thing", "e\u2028thing", "f thing"]
    config_of = loop(tmp_path / "run").model_copy(update={"prompts": tuple(odd), "rounds": 1})
    assert runs.improve(config_of, progress=False)["finished"]
    assert {prompt for prompt, _ in api.wanted()} == {*odd} - {"d thing"}  # of four, the round trains on three
    asked = len(api.asked)
    assert runs.improve(config_of, resume=True, progress=False)["finished"]
    assert len(api.asked) == asked


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["objective.beta=2"], "fit is flow, and objective is for fit=weights; the section flow says"),
        (["train.steps=2", "trainable.rank=2"], "trainable and train are for fit=weights"),
        (["reference.kind=ema"], "reference is for"),
        (["switches.winner_nll=1"], "switches is for"),
        (["replay.rounds=1"], "earlier pairs begin elsewhere"),
        (["draw.when=ahead"], "set it to in_turn"),
        (["select.order=potential"], "asks a policy's weights"),
        (["draw.steps=3", "draw.guidance=2"], "draw.steps and draw.guidance cannot be set: a checkpoint"),
        (["generator=null"], "model.checkpoint is missing"),
        (["generator.url=nowhere"], "'nowhere' is not the address of an API"),
        (["draw.resolution=17"], "data.resolution being draw.resolution: .* needs a multiple of 2"),
        (["draw.resolution=null"], "data.resolution is missing"),
        (["flow.context.kind=prompt"], "needs model.checkpoint, whose text encoder"),
        (["flow.space.kind=latents"], "needs an autoencoder"),
    ],
)
def test_what_does_not_go_with_a_flow_is_refused_before_anything_is_paid_for(
    loop: Make, api: Seeded, tmp_path: Path, overrides: list[str], part: str
) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        runs.improve(loop(tmp_path / "run", *overrides), progress=False)
    assert "\n" not in str(caught.value)
    assert api.asked == []
    assert not (tmp_path / "run").exists()


def test_settings_of_the_flow_are_checked_as_all_are(loop: Make, tmp_path: Path) -> None:
    for override, says in (
        ("flow.match.coupling=otpc", "flow.match.coupling cannot be 'otpc'; did you mean 'ot'"),
        ("flow.match.sigm=1", "flow.match.sigm is not a setting; did you mean 'sigma'"),
        ("flow.solve.strength=2", "flow.solve.strength cannot be 2"),
        ("generator.modell=x", "generator.modell is not a setting; did you mean 'model'"),
    ):
        with pytest.raises(ConfigError, match=says):
            loop(tmp_path, override)


@pytest.mark.slow
def test_killed_at_many_instants_it_asks_for_little_again_and_ends_alike(
    whole: Path, loop: Make, api: Seeded, tmp_path: Path
) -> None:
    kills = killed_at_many_instants(loop(tmp_path / "run"), tmp_path / "improve.yaml")
    assert_equal(tmp_path / "run", whole)
    assert len(set(api.wanted())) == PICTURES
    assert len(api.asked) - PICTURES <= 4 * kills  # what was under way when it was killed


def emoji_loop(run: Path, emoji: Path, weight: float) -> ImproveConfig:
    tree = {
        "fit": "flow",
        "model": {"checkpoint": str(emoji / "tiny-sd")},
        "prompts": str(emoji / "preferences" / "fluent_over_noto-train.jsonl"),
        "held_out": str(emoji / "preferences" / "fluent_over_noto-held_out.jsonl"),
        "rounds": 2,
        "rewards": ["colourfulness"],
        "calibrate": {"weights": {"colourfulness": weight}},
        "draw": {"prompts": 16, "images": 4, "steps": 8, "guidance": 3.0, "batch_size": 24, "precision": "bf16"},
        "select": {"by": "margin", "most": 3},
        "flow": {
            "context": {"kind": "none"},
            "field": {"width": 32, "levels": 2},
            "train": {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "ema": None, "device": "cpu"},
            "solve": {"steps": 2},
        },
        "evaluate": {"prompts": 16},
        "hacking": {"policy": "off"},
        "output": str(run),
    }
    return config.parse_tree(ImproveConfig, tree)


@pytest.mark.slow
def test_it_moves_what_it_is_asked_to_move(emoji: Path, tmp_path: Path) -> None:
    """On held-out prompts; with the selection turned around, the other way; by two flows further than by one."""
    ends = {}
    for weight in (1.0, -1.0):
        run = tmp_path / str(weight)
        if weight < 0:  # the base draws the same
            for part in ("pictures", "evaluation"):
                shutil.copytree(tmp_path / "1.0" / "rounds" / "base" / part, run / "rounds" / "base" / part)
        found = runs.improve(emoji_loop(run, emoji, weight), progress=False)
        base, first, ends[weight] = (each["measures"]["colourfulness"] for each in (found["base"], *found["rounds"]))
        assert 0 < weight * (first["mean"] - base["mean"]) < weight * (ends[weight]["mean"] - base["mean"])
    for measure in ("calibrated", "win_rate"):
        assert ends[1.0][measure]["low"] > 0.5 > ends[-1.0][measure]["high"], measure
