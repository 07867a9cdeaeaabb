from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from flowalign import config, plugins, yaml_text
from flowalign.errors import ConfigError
from flowalign.flow.settings import FlowConfig
from flowalign.improve_settings import ImproveConfig
from flowalign.sections import Data, Model, Section
from flowalign.settings import Config

SMALL = {"model": {"checkpoint": "tiny-sd"}, "data": {"train": "pairs.jsonl"}}
YAML = "model:\n  checkpoint: tiny-sd\ndata:\n  train: pairs.jsonl\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(data: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(data, "run.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("text", ["one\u2028two", "one\u2029two", "one\x85two", "\x85", "one\ntwo\x85 ", "1e-5", " 'a': \"b\""])
def test_texts_come_back_as_they_were_written(text: str) -> None:
    values = {"prompts": [text], text: 1}
    assert yaml_text.read(yaml_text.write(values)) == values


def test_what_is_not_written_has_its_default(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, YAML))
    assert loaded == Config(model=Model(checkpoint="tiny-sd"), data=Data(train="pairs.jsonl"))
    assert (loaded.train.steps, loaded.train.learning_rate, loaded.train.adam_betas) == (1000, 1e-5, (0.9, 0.999))
    assert (loaded.objective.name, loaded.objective.knobs) == ("dpo", {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("2.5e-6", 2.5e-6),
        ("3e+1", 30.0),
        ("5e3", 5000.0),
        (".5e-3", 5e-4),
        ("1_0e-1", 1.0),
        ("1", 1.0),
    ],
)
def test_numbers_are_numbers_however_they_are_written(tmp_path: Path, text: str, value: float) -> None:
    path = write(tmp_path, f"{YAML}train:\n  learning_rate: {text}\nobjective:\n  beta: {text}\n")
    loaded = config.load(path)
    assert loaded.train.learning_rate == value
    assert loaded.objective.knobs == {"beta": value}


def test_the_resolved_copy_gives_the_same_configuration_back(tmp_path: Path) -> None:
    overrides = [
        "model.revision='1e5'",
        "model.variant='007'",
        "data.columns={prompt: caption, chosen: 'yes'}",
        "train.adam_eps=1e-15",
        "train.trackers=[tensorboard]",
        "trainable.targets=[to_k, to_q]",
        "objective.beta=500",
        "objective.label_smoothing=1e-1",
        "sample.prompts=['a → b', 'c: d']",
        "judges=samples/emoji/judges",
        "output='runs/é'",
    ]
    loaded = config.load(write(tmp_path, YAML), overrides)
    text = config.dump(loaded)
    assert config.load(write(tmp_path, text)) == loaded
    assert loaded.model.revision == "1e5"
    assert loaded.objective.knobs == {"beta": 500, "label_smoothing": 0.1}
    assert "keep_checkpoints: 2" in text, "defaults are written out"


def test_later_overrides_win_and_the_callers_values_stay_as_they_are() -> None:
    data = {**SMALL, "train": None}
    parsed = config.parse(data, overrides=["train.steps=7", "train.steps=8", "train.clip_norm=null", "data.flip=true"])
    assert (parsed.train.steps, parsed.train.clip_norm, parsed.data.flip) == (8, None, True)
    assert data == {**SMALL, "train": None}


def test_a_configuration_cannot_be_changed() -> None:
    parsed = config.parse(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        parsed.train.steps = 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=1", ["train.stepz", "did you mean 'steps'?", "warmup_steps"]),
        ("train.objective.beta=1", ["train.objective is not a setting", "allowed: accumulation"]),
        ("steps=1", ["did you mean train.steps or sample.steps?"]),
        ("modle.checkpoint=x", ["modle", "did you mean 'model'?"]),
        ("train.precision=bf32", ["train.precision cannot be 'bf32'", "allowed: bf16, fp16, fp32"]),
        ("data.format=no", ["data.format cannot be false", "jsonl"]),
        ("train.steps=0", ["train.steps cannot be 0", "greater than or equal to 1"]),
        ("train.steps=1.5", ["train.steps cannot be 1.5", "integer"]),
        ("train.steps='8'", ["train.steps cannot be '8'", "integer"]),
        ("train.batch_size=true", ["train.batch_size cannot be true", "integer"]),
        ("train.learning_rate=0", ["greater than 0"]),
        ("train.learning_rate=.inf", ["finite"]),
        ("train.learning_rate=.nan", ["finite"]),
        ("train.ema=1", ["train.ema cannot be 1", "less than 1"]),
        ("train.caption_dropout=1.1", ["less than or equal to 1"]),
        ("train.adam_betas=[0.9, 1.0]", ["train.adam_betas.1 cannot be 1.0"]),
        ("train.adam_betas=[0.9]", ["train.adam_betas cannot be [0.9]", "missing"]),
        ("train.timestep_range=[0.5, 0.2]", ["train.timestep_range cannot be [0.5, 0.2]: the first end must be below"]),
        ("train.timestep_range=[0, 2]", ["train.timestep_range.1 cannot be 2", "less than or equal to 1"]),
        ("train.trackers=tensorboard", ["train.trackers cannot be 'tensorboard'", "list"]),
        ("data.held_out=0.6", ["less than or equal to 0.5"]),
        ("data.columns.prompt=3", ["data.columns.prompt cannot be 3", "quotes"]),
        ("trainable.targets=[]", ["trainable.targets cannot be []", "at least 1"]),
        ("sample.prompts=[a, 2]", ["sample.prompts.1 cannot be 2", "quotes"]),
        ("model.revision=123", ["model.revision cannot be 123", "quotes"]),
        ("model=null", ["model cannot be null", "section"]),
        ("train=5", ["train cannot be 5", "section"]),
        ("train.steps=[", ["not valid YAML", "line 1"]),
        ("train.steps", ["section.key=value"]),
        (".steps=1", ["section.key=value"]),
        ("output.name=x", ["output"]),
    ],
)
def test_a_wrong_override_is_one_sentence_that_names_it(override: str, parts: list[str]) -> None:
    message = refused({**SMALL, "output": "runs/x"}, "data.flip=true", override)
    assert all(part in message for part in [*parts, f"--set {override}"]), message


def test_a_wrong_value_in_the_file_is_said_of_the_file() -> None:
    assert refused({**SMALL, "train": {"steps": -1}}, "data.flip=true").startswith("run.yaml: train.steps cannot be -1: ")
    assert "run.yaml: train.lr is not a setting" in refused({**SMALL, "train": {"lr": 1}})


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({}, "model is missing; set it to a section with a checkpoint"),
        ({"model": {"checkpoint": "x"}, "data": {}}, "data.train is missing; set it to a file"),
        (None, "null"),
        (["model"], "model"),
        ("text", "'text'"),
    ],
)
def test_what_is_missing_is_said(data: object, part: str) -> None:
    assert part in refused(data)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: [", ["is not valid YAML", "line 1"]),
        (YAML + "train:\n  steps: 1\n  seed: 2\n  steps: 3\n", ["'steps'", "twice", "line 8"]),
        (YAML + YAML, ["'model'", "twice", "line 5"]),
        ("model: !!python/object/apply:os.getcwd []\n", ["is not valid YAML", "python/object"]),
        ("? [a]\n: b\n", ["not valid YAML"]),
        ("", ["null"]),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, text))
    assert all(part in str(caught.value) for part in [*parts, "run.yaml"]), caught.value


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "binary.yaml")


def test_every_setting_says_what_it_is() -> None:
    for name, field in Config.model_fields.items():
        for key, setting in getattr(field.annotation, "model_fields", {name: field}).items():
            assert setting.description, f"{name}.{key}"


def objective(terms: object, *, beta: float, tau: float = 1.0, draws: int = 1) -> None:
    """Stands for a loss with three knobs."""


PARAMETERS = inspect.signature(objective, eval_str=True).parameters


def test_knobs_of_the_objective_are_let_through() -> None:
    config.check_knobs("mine", {"beta": 5, "tau": 0.5, "draws": 2}, PARAMETERS)
    config.check_knobs("mine", {"beta": 5.0}, PARAMETERS)


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({"beta": 1, "beat": 2}, ["objective.beat", "'mine'", "did you mean 'beta'?", "allowed: beta, draws, tau"]),
        ({"beta": 1, "terms": 2}, ["objective.terms", "allowed: beta, draws, tau"]),
        ({"beta": "big"}, ["objective.beta", "'big'", "number"]),
        ({"beta": True}, ["objective.beta", "true", "number"]),
        ({"beta": math.nan}, ["objective.beta", "finite"]),
        ({"beta": 1, "draws": 1.5}, ["objective.draws", "1.5", "integer"]),
        ({"tau": 1.0}, ["objective.beta is missing"]),
    ],
)
def test_other_knobs_are_refused(knobs: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.check_knobs("mine", knobs, PARAMETERS)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_objective_without_knobs_says_so() -> None:
    with pytest.raises(ConfigError, match="has no knobs"):
        config.check_knobs("plain", {"beta": 1}, inspect.signature(lambda terms: None).parameters)


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
        if path.read_text(encoding="utf-8").startswith("# flowalign align ")
    ],
    ids=lambda path: path.stem,
)
def test_the_configurations_that_ship_are_whole(path: Path) -> None:
    loaded = config.load(path)
    config.check_knobs(loaded.objective.name, loaded.objective.knobs, parameters_of(loaded.objective.name))
    assert loaded.output.startswith("runs/")


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(plugins.load("objectives", name), eval_str=True).parameters


TREES: dict[type[Section], dict[str, Any]] = {
    Config: SMALL | {"steer": {"objectives": ["a", "b"]}, "users": {}},
    FlowConfig: {"model": {"checkpoint": "m"}, "data": {"train": "pairs.jsonl"}, "scores": {"table": "t.parquet"}},
    ImproveConfig: {
        "model": {"checkpoint": "m"},
        "generator": {"url": "http://a/v1", "model": "m"},
        "prompts": "p.txt",
        "rewards": ["style"],
        "steer": {"objectives": ["a", "b"]},
    },
}
WRONG = ("wrong", -1, 2**64, 2.5, math.inf, True, None, [], ["wrong"], [1], [[None]], {}, {"wrong": 1})


def keys(tree: type[Section], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every setting of a tree."""
    for name, field in tree.model_fields.items():
        yield (*above, name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from keys(kind, (*above, name))


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)
def test_whatever_is_written_for_any_setting_is_taken_or_one_sentence(tree: type[Section]) -> None:
    config.parse_tree(tree, TREES[tree])
    refusals = set()
    for *sections, key in keys(tree):
        for wrong in WRONG:
            data = copy.deepcopy(TREES[tree])
            place = data
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = wrong
            try:
                config.parse_tree(tree, data, "run.yaml")
            except ConfigError as error:
                refusals.add(((*sections, key), str(error)))
    assert {path for path, _ in refusals} == set(keys(tree))
    assert not [said for _, said in refusals if "\n" in said]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)
def test_seeds_are_numbers_that_can_be_counted_up_and_held(tree: type[Section]) -> None:
    seeds = [path for path in keys(tree) if path[-1] == "seed"]
    assert seeds
    for path in seeds:
        name = ".".join(path)
        with pytest.raises(ConfigError, match=rf"{name} cannot be {2**63}: "):
            config.parse_tree(tree, TREES[tree], "run.yaml", [f"{name}={2**63}"])
        config.parse_tree(tree, TREES[tree], "run.yaml", [f"{name}={2**61}"])
