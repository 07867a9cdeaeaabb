"""GMSD is the authors' formula, in scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import signal

from flowalign.errors import ConfigError, DataError, RunError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring.photographs import blurred, noisy, photograph, random_picture

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str, **settings: object) -> Reward:
    return load_rewards([{"name": name, **settings}], Shelf(torch.device("cpu")))[0]


def score(reward: Reward, *images: Image.Image) -> list[float]:
    return reward.score(images, ["x"] * len(images)).tolist()


def grey(image: Image.Image) -> NDArray[np.float64]:
    return np.array(image).astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def gmsd(image: Image.Image, other: Image.Image) -> float:
    """As the authors' MATLAB says it: conv2 of the same size, every other pixel, std2."""

    def edges(each: Image.Image) -> NDArray[np.float64]:
        y = np.pad(grey(each), ((0, 1), (0, 1)))
        means = signal.convolve2d(y, np.full((2, 2), 0.25), "valid")[::2, ::2]
        prewitt = np.array([[1, 0, -1]] * 3) / 3
        return np.hypot(signal.convolve2d(means, prewitt, "same"), signal.convolve2d(means, prewitt.T, "same"))

    a, b = edges(image), edges(other)
    return float(((2 * a * b + 170) / (a**2 + b**2 + 170)).std(ddof=1))


def test_gmsd_is_the_published_formula(tmp_path: Path) -> None:
    for size in ((1, 3), (3, 5), (33, 20), (64, 64)):
        reference = random_picture(*size, seed=1)
        reference.save(tmp_path / "reference.png")
        images = [random_picture(*size, seed=seed) for seed in (1, 2, 3)]
        found = score(load("gmsd", reference=str(tmp_path / "reference.png")), *images)
        assert found == pytest.approx([gmsd(each, reference) for each in images], rel=1e-4, abs=1e-5)
        assert found[0] == pytest.approx(0, abs=1e-6)


def test_what_is_further_from_the_reference_has_a_larger_gmsd(tmp_path: Path) -> None:
    image = photograph("flower.jpg").crop((100, 100, 356, 356))
    image.save(tmp_path / "reference.png")
    reward = load("gmsd", reference=str(tmp_path / "reference.png"))
    for changed in ([noisy(image, d) for d in (3, 10, 30)], [blurred(image, r) for r in (1, 2, 4)]):
        found = score(reward, image, *changed)
        assert found == sorted(found)
        assert found[1] > 0
    smaller = image.resize((128, 128), Image.Resampling.BICUBIC)  # the reference is resized to it
    assert score(reward, smaller)[0] < 0.02


def test_a_reference_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for name, said in (("none.png", "No such file"), ("text.png", "not a readable picture")):
        with pytest.raises(DataError, match=said):
            load("gmsd", reference=str(tmp_path / name))
    with pytest.raises(ConfigError, match="needs reference"):
        load("gmsd")
    random_picture(2, 2).save(tmp_path / "small.png")
    with pytest.raises(RunError, match="more than 2 pixels"):
        score(load("gmsd", reference=str(tmp_path / "small.png")), random_picture(2, 2))
