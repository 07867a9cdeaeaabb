"""Rewards over HTTP."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Backbone, Card, Reward, Shelf
from flowalign.serve.app import make_service
from flowalign.serve.limits import Limits
from tests.serve.upstream import encoded, gradient

Post = Callable[..., httpx.Response]


class Means(Backbone):
    key = "means"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[int] = []

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).double().mean((0, 1))

    def see(self, inputs: Sequence[Any]) -> Tensor:
        self.seen.append(len(inputs))
        return torch.stack(list(inputs))


class Channel(Reward):
    """Mean of one channel; NaN for pictures without it, as a model that breaks."""

    def __init__(self, name: str, channel: int, backbone: Means) -> None:
        self.backbone, self.channel = backbone, channel
        self.card = Card(name, name, (0.0, math.inf), "higher", "Apache-2.0", "here", "none", False, False, f"{name}-1")

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        found = features[:, self.channel]
        return torch.where(found > 0, found, torch.nan)


class Length(Channel):
    """Length of the prompt."""

    def __init__(self, backbone: Means) -> None:
        super().__init__("length", 0, backbone)
        self.card = Card("length", "", (0.0, 1e9), "lower", "none", "here", "none", True, False, "length-1")

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.fixture
def means() -> Means:
    return Means()


@pytest.fixture
def scorer(serve: Callable[..., str], means: Means) -> Callable[..., str]:
    def start(**limits: Any) -> str:
        rewards = [Channel("red", 0, means), Channel("blue", 2, means), Length(means)]
        return serve(make_service(None, rewards=rewards, limits=Limits(**limits)))

    return start


def entry(data: bytes, prompt: str = "fox") -> dict[str, str]:
    return {"b64_json": base64.b64encode(data).decode(), "prompt": prompt}


def test_scores_are_the_rewards_and_one_forward_serves_all(scorer: Callable[..., str], post: Post, means: Means) -> None:
    pictures = [gradient("x", place) for place in range(3)]
    datas = [encoded(pictures[0]), encoded(pictures[1], "webp", lossless=True), encoded(pictures[2])]
    body = {"images": [entry(data, "f" * (place + 1)) for place, data in enumerate(datas)]}
    got = post(scorer(batch_wait=0.2), body, "/v1/score")
    assert got.status_code == 200
    for place, (row, picture) in enumerate(zip(got.json()["data"], pictures, strict=True)):
        colours = np.asarray(picture).mean((0, 1))
        assert row["index"] == place
        assert row["scores"] == pytest.approx({"red": colours[0], "blue": colours[2], "length": place + 1}, rel=1e-6)
        assert row["errors"] == {}
    assert means.seen == [3]
    cards = {card["name"]: card for card in got.json()["rewards"]}
    assert (cards["length"]["better"], cards["red"]["range"]) == ("lower", [0.0, None])


def test_rewards_that_a_user_names_score_as_they_do_here(serve: Callable[..., str], post: Post) -> None:
    rewards = load_rewards(["sharpness", {"name": "colourfulness", "as": "colour"}], Shelf(torch.device("cpu")))
    pictures = [gradient("x", place, (40 + place, 33)) for place in range(3)]
    body = {"images": [{"b64_json": entry(encoded(picture))["b64_json"]} for picture in pictures]}  # they read no prompt
    rows = post(serve(make_service(None, rewards=rewards)), body, "/v1/score").json()["data"]
    for name, reward in zip(("sharpness", "colour"), rewards, strict=True):
        expected = reward.score(pictures, [""] * 3).tolist()
        assert [row["scores"][name] for row in rows] == pytest.approx(expected, rel=1e-5)
        assert len(set(expected)) == 3


def test_some_rewards_can_be_asked_for(scorer: Callable[..., str], post: Post) -> None:
    got = post(scorer(), {"images": [entry(encoded(gradient("x", 0)))], "rewards": ["blue"]}, "/v1/score")
    assert list(got.json()["data"][0]["scores"]) == ["blue"]


def test_a_failure_is_no_number_and_costs_only_itself(scorer: Callable[..., str], post: Post) -> None:
    dark = Image.new("RGB", (8, 8), (0, 5, 9))
    body = {"images": [entry(encoded(gradient("x", 0))), entry(encoded(dark))]}
    fine, failed = post(scorer(batch_wait=0.2), body, "/v1/score").json()["data"]
    assert fine["errors"] == {}
    assert failed["scores"] == {"red": None, "blue": 9.0, "length": 3.0}
    assert list(failed["errors"]) == ["red"]
    assert "red is nan" in failed["errors"]["red"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "images"),
        ({"images": []}, "images"),
        ({"images": [{}] * 65}, "images"),
        ({"images": ["x"]}, "images[0]"),
        ({"images": [entry(encoded(gradient("x", 0)))], "rewards": ["pickle"]}, "rewards"),
        ({"images": [entry(encoded(gradient("x", 0)))], "rewards": "red"}, "rewards"),
        ({"images": [entry(encoded(gradient("x", 0)), "")]}, "images[0].prompt"),
        ({"images": [entry(encoded(gradient("x", 0), "jpeg"))]}, "images[0]"),
        ({"images": [entry(encoded(gradient("x", 0), "webp", quality=90))]}, "images[0]"),
        ({"images": [entry(encoded(gradient("x", 0))[:-40])]}, "images[0]"),
        ({"images": [entry(encoded(gradient("x", 0, (65, 64))))]}, "images[0]"),
        ({"images": [entry(b"\x80\x04\x95")]}, "images[0]"),
        ({"images": [{"b64_json": "?", "prompt": "x"}]}, "images[0].b64_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_scored_is_a_bad_request(
    scorer: Callable[..., str], post: Post, means: Means, body: dict[str, Any], param: str
) -> None:
    got = post(scorer(pixels=64 * 64), body, "/v1/score")
    assert (got.status_code, got.json()["error"]["param"]) == (400, param)
    assert means.seen == []


def test_a_server_of_scores_alone_draws_nothing(scorer: Callable[..., str], post: Post) -> None:
    url = scorer()
    assert post(url, {"prompt": "fox"}).status_code == 404
    assert set(httpx.get(f"{url}/openapi.json").json()["paths"]) == {"/v1/score", "/healthz", "/readyz", "/metrics"}
