"""A policy that is told each picture's own scores (RiC): how they travel, what is learned, drawn for and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign import runs
from flowalign.align.steer import even_and_corners
from flowalign.data.pairs import Item
from flowalign.data.weights import WEIGHTS, scores_in_order, targets
from flowalign.errors import ConfigError, DataError
from flowalign.families.steer import Shift, load_steering, shift_for
from flowalign.rng import Keyed
from flowalign.settings import Steer
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]
TOLD = ("steer={objectives: [red, bright], condition: scores, hidden: 16, dropout: 0}", "objective={name: sft}")
TOLD += ("train.caption_dropout=0",)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red and a blue picture of each of eight things, and how red and how bright they are."""
    folder, rng = tmp_path_factory.mktemp("scored"), np.random.default_rng(0)
    lines = []
    for place in range(8):
        for name, tint in (("red", (225, 30, 30)), ("blue", (30, 30, 225))):
            pixels = rng.normal(tint, 20, (32, 32, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{place}-{name}.png")
        row = {"prompt": f"{'abcdef'[place % 6]} thing", "chosen": f"{place}-red.png", "rejected": f"{place}-blue.png"}
        row["scores"] = {"bright": [0.5, 0.25 + place / 20], "red": [0.9, 0.1 + place / 100]}
        lines.append(json.dumps(row) + "\n")
    (folder / "scored.jsonl").write_text("".join(lines))
    return folder / "scored.jsonl"


@pytest.fixture
def data(scored: Path) -> tuple[str, ...]:
    return f"data.train={scored}", f"data.validation={scored}"


def test_each_picture_is_told_its_own_scores(prepared: Make, data: Any) -> None:
    ready = prepared(*TOLD, *data, "train.batch_size=3")
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    batch = ready.first_batch()
    assert batch.objective_weights is not None
    rows = [json.loads(line)["scores"] for line in Path(ready.config.data.train).read_text().splitlines()]
    place = {int(each): int(index) for each, index in zip(ready.train.cached.ids, ready.train.cached.indices, strict=True)}
    own = [[[rows[place[each]][name][picture] for name in ("red", "bright")] for picture in (0, 1)] for each in batch.ids]
    torch.testing.assert_close(batch.objective_weights, torch.tensor(own))
    x_t, target, t = ready.step.noised(batch, Keyed(0))
    told = ready.step.told(batch).joined(WEIGHTS, torch.tensor(own).flatten(0, 1))
    with torch.no_grad():
        expected = (ready.policy(ready.family, x_t, t, told) - target).square().flatten(1).mean(1).view(3, 2)
        loss, _ = ready.step(batch, Keyed(0))
    torch.testing.assert_close(loss, expected.mean(1))
    dropped = ready.train.__getitems__([Item(place, 0, place, False, False, True) for place in range(3)])
    assert dropped.objective_weights is not None
    assert not dropped.objective_weights.any()


def test_scores_go_in_around_zero_and_weights_as_before() -> None:
    weights = Shift(2, 6, 8, gain=10.0)
    scores = shift_for(load_settings("scores"), 6)
    for shift in (weights, scores):
        shift.layers[-1].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    tokens, row = torch.zeros(1, 1, 6), torch.tensor([[0.25, 0.75]])
    assert torch.equal(weights(tokens, row), scores(tokens, row))  # 2w − 1 for both: two objectives
    three = Shift(3, 6, 8)
    assert three.scale == 3
    assert shift_for(load_settings("scores", "a", "b", "c"), 6).scale == 2
    assert torch.equal(scores(tokens, torch.zeros(1, 2)), tokens)


def load_settings(condition: str, *names: str) -> Any:
    return Steer(objectives=names or ("red", "bright"), condition=condition, hidden=8)


def test_a_run_learns_from_scores_and_draws_for_targets(settings: Any, data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = ("train.steps=12", "train.learning_rate=5e-3", "train.batch_size=8")
    assert runs.align(settings(folder, *TOLD, *data, *steps), progress=False)["finished"]
    assert load_steering(folder).settings.condition == "scores"
    drawn = {}
    for name, wanted in {"high": {"red": 0.9, "bright": 0.5}, "low": {"bright": 0.5, "red": 0.1}}.items():
        runs.generate(str(folder), ["a thing"], out=tmp_path / name, steps=2, targets=wanted, progress=False)
        drawn[name] = (tmp_path / name / "00000-0.png").read_bytes()
        assert json.loads((tmp_path / name / "metadata.jsonl").read_text())["weights"] == wanted
    assert drawn["high"] != drawn["low"]
    for wrong, said in (
        ({"red": 0.9}, "targets say nothing of bright"),
        ({"red": 0.9, "bright": 1.5}, "the target of bright is 1.5"),
        ({"red": 0.9, "bright": 0.5, "blue": 1.0}, "targets name 'blue'"),
        ({"red": 0.0, "bright": 0.0}, "all targets are 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            runs.generate(str(folder), ["a thing"], out=tmp_path / "x", targets=wrong, progress=False)
    with pytest.raises(ConfigError, match="was told scores; give targets instead"):
        runs.generate(str(folder), ["a thing"], out=tmp_path / "x", weights={"red": 1.0}, progress=False)
    with pytest.raises(ConfigError, match="both given"):
        runs.generate(str(folder), ["a"], out=tmp_path / "x", weights={"red": 1.0}, targets={"red": 1.0}, progress=False)


def test_sample_pictures_are_drawn_for_high_scores_by_all_and_by_each() -> None:
    found = even_and_corners(load_settings("scores"))
    assert found == [{"red": 0.9, "bright": 0.9}, {"red": 0.9, "bright": 0.5}, {"red": 0.5, "bright": 0.9}]
    assert targets({"bright": 0.5, "red": 1.0}, ("red", "bright")) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (None, "no score by 'red'"),
        ({"red": (1.0, 0.5)}, "no score by 'bright'"),
        ({"red": (1.5, 0.5), "bright": (0, 1)}, "from 0 to 1"),
        ({"red": (0.5, 0), "bright": (0.5, 0)}, "not all 0"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        scores_in_order(scores, ("red", "bright"))
    assert scores_in_order({"bright": (0.2, 0.4), "red": (0.1, 0.3)}, ("red", "bright")) == (0.1, 0.2, 0.3, 0.4)


def test_what_does_not_go_together_is_one_sentence(prepared: Make, data: Any) -> None:
    with pytest.raises(ConfigError, match="sft learns from"):
        prepared(TOLD[0], *data)
    with pytest.raises(ConfigError, match="says the same of all pictures"):
        prepared("steer={objectives: [red, bright], condition: scores, form: prompt}", TOLD[1], *data)
