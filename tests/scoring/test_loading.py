"""What a user writes becomes rewards, and every mistake one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowalign import cli, plugins
from flowalign.errors import CheckpointError, ConfigError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf
from tests.scoring import tiny_towers
from tests.scoring.test_every_reward import PROMPTS, pictures

pytestmark = pytest.mark.usefixtures("one_thread")

OUTSIDE = '''"""A reward of others. With more to say."""
import torch

from flowalign.scoring.rewards.base import Backbone, Card, Reward


class Plain(Backbone):
    key = "plain pixels"
    device = torch.device("cpu")

    def prepare(self, image):
        return torch.tensor(float(image.width))

    def see(self, inputs):
        return torch.stack(list(inputs))


class Width(Reward):
    def __init__(self, shelf, factor):
        self.backbone = shelf.take("plain pixels", Plain)
        self.factor = factor
        self.card = Card(
            name="width", title="Width: how wide it is", range=(0.0, float("inf")), better="higher", licence="none",
            source="here", weights="none", reads_prompt=False, differentiable=False, fingerprint=f"width-1-{factor}",
        )

    def judge(self, features, prompts):
        return self.factor * features


def load(shelf, *, factor: float, unit: str = "px"):
    return Width(shelf, factor)


REWARD = load
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a tiny open_clip model `tower` and a head `head.pth`."""
    (tmp_path / "tower").mkdir()
    tiny_towers.open_clip_folder(tmp_path / "tower")
    tiny_towers.head(tmp_path, "v1").rename(tmp_path / "head.pth")
    return tmp_path


@pytest.fixture
def width(install: Callable[..., None], tmp_path: Path) -> None:
    """An installed package that offers a reward."""
    install("outside_rewards", OUTSIDE)
    (tmp_path / "outside_rewards-1.0.dist-info" / "entry_points.txt").write_text(
        "[flowalign.rewards]\nwidth = outside_rewards:load\n"
    )


def load(*specs: Any) -> list[Any]:
    return load_rewards(specs, Shelf(torch.device("cpu")))


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_of_rewards(tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Its paths are relative to it, wherever the command runs; names, settings and columns are as written."""
    entries = [
        {"name": "clip", "as": "caption", "model": "tower", "scale": 100},
        {"name": "aesthetic", "as": "style", "model": "tower", "weights": "./head.pth"},
        {"name": "aesthetic", "model": "tower", "weights": "head.pth"},
    ]
    path = tiny / f"rewards.{kind}"
    path.write_text(json.dumps(entries) if kind == "json" else yaml.safe_dump(entries))
    (tiny / "elsewhere").mkdir()
    monkeypatch.chdir(tiny / "elsewhere")
    rewards = load(str(path))
    assert [reward.card.name for reward in rewards] == ["caption", "style", "aesthetic"]
    assert len({id(reward.backbone) for reward in rewards}) == 1
    scores = [reward.score(pictures(), PROMPTS) for reward in rewards]
    assert torch.equal(scores[1], scores[2])
    direct = load({"name": "clip", "model": str(tiny / "tower")})[0].score(pictures(), PROMPTS)
    torch.testing.assert_close(scores[0], 100 * direct, rtol=1e-5, atol=1e-4)


def test_a_column_name_does_not_change_the_fingerprint(tiny: Path) -> None:
    """Scores that were kept under one name are still good under another."""
    model = str(tiny / "tower")
    first, second = load({"name": "clip", "model": model}, {"name": "clip", "as": "again", "model": model})
    assert first.card.fingerprint == second.card.fingerprint
    assert (first.card.name, second.card.name) == ("clip", "again")


def test_settings_change_the_fingerprint(tiny: Path) -> None:
    model = str(tiny / "tower")
    first, second = load({"name": "clip", "model": model}, {"name": "clip", "as": "again", "model": model, "scale": 2.5})
    assert first.card.fingerprint != second.card.fingerprint


def test_a_reward_of_an_installed_package(width: None) -> None:
    (reward,) = load({"name": "width", "factor": 2})
    assert reward.score(pictures(), PROMPTS).tolist() == [160.0, 128.0, 140.0, 192.0]
    with pytest.raises(ConfigError, match=r"the reward width needs factor; write \{name: width, factor: \.\.\.\}"):
        load("width")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no rewards are named; flowalign rewards lists them."),
        (["clpi"], "did you mean 'clip'? allowed: "),
        (["open_clip_tower"], "is not one of the rewards"),
        ([{"as": "x"}], "names no reward"),
        ([{"name": 3}], "names no reward"),
        ([{"name": "clip", "modle": "x"}], "the reward clip has no setting 'modle'; did you mean 'model'? allowed: as, model"),
        ([{"name": "clip", "shelf": "x"}], "the reward clip has no setting 'shelf'"),
        ([{"name": "clip", "model": 3}], "model of the reward clip is 3: input should be a valid string."),
        ([{"name": "clip", "scale": "big"}], "scale of the reward clip is 'big': input should be a valid number."),
        ([{"name": "clip", "scale": True}], "scale of the reward clip is True: input should be a valid number."),
        (["clip", "clip"], "two rewards are named 'clip'; give one of them another name with as: NAME."),
        ([{"name": "clip", "as": "a b"}], "'a b' cannot name a column"),
        (["nowhere.yaml"], "nowhere.yaml cannot be read as a list of rewards"),
    ],
)
def test_mistakes_are_one_sentence(specs: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*specs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: clip, name: siglip}\n", "the key 'name' is written twice (line 1, column 16)"),
        ("name: clip\n", "is not a list of rewards; write - NAME or - {name: NAME, ...}, one a line."),
        ("- [clip]\n", "is not a list of rewards"),
        ("- other.yaml\n", "lists the file other.yaml; name that file beside it instead."),
        ("", "is not a list of rewards"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rewards.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "rewards.yaml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_are_found_before_anything_is_loaded(tiny: Path) -> None:
    shelf = Shelf(torch.device("cpu"))
    with pytest.raises(ConfigError, match="no setting"):
        load_rewards([{"name": "clip", "model": str(tiny / "tower")}, {"name": "siglip", "mode": "x"}], shelf)
    assert not shelf.held


def test_missing_weights_say_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network and with an empty cache."""
    import huggingface_hub.constants

    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    wanted = {
        "clip": "openai of ViT-L-14 cannot be loaded",
        "hpsv2": "HPS_v2.1_compressed.pt of xswu/HPSv2",
        "pickscore": "yuvalkirstain/PickScore_v1 is no model",
        "siglip": "google/siglip-so400m-patch14-384 is no model",
    }
    for name, message in wanted.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load(name)
        assert "while online" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_list_of_rewards_says_what_the_rewards_say(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out.splitlines()[-1])["rewards"]}
    assert list(listed) == list(plugins.names("rewards"))
    (reward,) = load({"name": "clip", "model": str(tiny / "tower")})
    entry = listed["clip"]
    assert entry["title"] == reward.card.title
    assert entry["better"] == reward.card.better
    assert entry["source"] == reward.card.source
    assert entry["differentiable"] == str(reward.card.differentiable)
    assert entry["reads_prompt"] == str(reward.card.reads_prompt)
    assert entry["settings"] == {"model": "'ViT-L-14'", "pretrained": "''", "scale": "1.0"}
    assert listed["pickscore"]["settings"]["model"] == "'yuvalkirstain/PickScore_v1'"
    for each in listed.values():
        assert each["title"]
        assert "{" not in each["title"]
        assert each["better"] in ("higher", "lower")
        assert each["differentiable"] in ("True", "False")
    assert cli.main(["rewards"]) == 0
    shown = capsys.readouterr().out
    for name in listed:
        assert f"\n{name}  " in f"\n{shown}".replace(f"{name:{max(map(len, listed))}}", name)


def test_a_reward_of_others_is_listed(width: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards", "--json"]) == 0
    (entry,) = (entry for entry in json.loads(capsys.readouterr().out.splitlines()[-1])["rewards"] if entry["name"] == "width")
    assert entry["title"] == "Width: how wide it is"
    assert entry["settings"] == {"factor": "", "unit": "'px'"}
    assert entry["range"] == "(0.0, inf)"
