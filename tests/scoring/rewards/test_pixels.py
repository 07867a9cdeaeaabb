"""Rewards that are formulas, written out again in NumPy, and what they must say of pictures that were made for it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import laplace
from torch import Tensor

from flowalign.errors import ConfigError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards import pixels
from flowalign.scoring.rewards.base import Shelf
from tests.scoring.photographs import blurred, noisy, photograph

NAMES = ("sharpness", "colourfulness", "grid_peak", "jpeg_size")
SIZES = ((1, 1), (3, 2), (17, 40), (64, 64))


@pytest.fixture(scope="module")
def score():  # type: ignore[no-untyped-def]
    rewards = {reward.card.name: reward for reward in load_rewards(list(NAMES), Shelf(torch.device("cpu")))}
    assert len({id(rewards[name].backbone) for name in NAMES[:3]}) == 1  # one decode for all
    return lambda name, *pictures: rewards[name].score(list(pictures), [""] * len(pictures)).tolist()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def luma(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


@pytest.mark.parametrize("size", SIZES)
def test_sharpness_is_the_spread_of_the_laplacian(score, size) -> None:  # type: ignore[no-untyped-def]
    image = noise(size)
    assert score("sharpness", image)[0] == pytest.approx(laplace(luma(image), mode="nearest").std(), abs=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_colourfulness_is_hasler_and_suesstrunks(score, size) -> None:  # type: ignore[no-untyped-def]
    image = noise(size, 1)
    red, green, blue = np.asarray(image, dtype=np.float64).transpose(2, 0, 1)
    rg, yb = red - green, (red + green) / 2 - blue
    wanted = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert score("colourfulness", image)[0] == pytest.approx(wanted, rel=1e-5, abs=1e-4)


def test_jpeg_size_is_the_size_of_the_file(score) -> None:  # type: ignore[no-untyped-def]
    image, out = noise((40, 24), 2), io.BytesIO()
    image.save(out, "JPEG", quality=95, subsampling=0)
    assert score("jpeg_size", image)[0] == pytest.approx(8 * len(out.getvalue()) / (40 * 24))
    plain = Image.new("RGB", (40, 24), "red")
    assert score("jpeg_size", plain)[0] < score("jpeg_size", image)[0] / 4


def test_pictures_encode_in_the_quality_that_is_asked_for() -> None:
    image, out = noise((40, 24), 2), io.BytesIO()
    image.save(out, "JPEG", quality=40, subsampling=0)
    (reward,) = load_rewards([{"name": "jpeg_size", "quality": 40}], Shelf(torch.device("cpu")))
    assert float(reward.score([image], [""])) == pytest.approx(8 * len(out.getvalue()) / (40 * 24))
    for quality in (0, 96):
        with pytest.raises(ConfigError, match=f"quality is {quality}; it must be between 1 and 95"):
            load_rewards([{"name": "jpeg_size", "quality": quality}], Shelf(torch.device("cpu")))


def test_blur_takes_sharpness_and_detail_and_noise_adds_them(score) -> None:  # type: ignore[no-untyped-def]
    for name in ("china.jpg", "flower.jpg"):
        image = photograph(name)
        steps = [*(blurred(image, radius) for radius in (4, 2, 1)), image, *(noisy(image, deviation) for deviation in (10, 40))]
        for reward in ("sharpness", "jpeg_size"):
            found = score(reward, *steps)
            assert found == sorted(found)
            assert found[-1] > 3 * found[0]


def test_less_colour_is_less_colourful(score) -> None:  # type: ignore[no-untyped-def]
    image = photograph("flower.jpg")
    plain = image.convert("L").convert("RGB")
    found = score("colourfulness", plain, Image.blend(plain, image, 0.1), Image.blend(plain, image, 0.5), image)
    assert found == sorted(found)
    assert found[0] == pytest.approx(0, abs=1e-4)


def test_a_picture_of_one_colour_has_gradients() -> None:
    for reward in load_rewards(["sharpness", "colourfulness"], Shelf(torch.device("cpu"))):
        x = torch.full((1, 3, 4, 4), 0.5).requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score_pixels(x, [""]).sum(), x)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", ["sharpness", "colourfulness"])
def test_pictures_of_all_sizes_go_in_one_batch(score, name: str) -> None:  # type: ignore[no-untyped-def]
    images = [noise(size, seed) for seed, size in enumerate((*SIZES, (17, 40), (1, 1)))]
    assert score(name, *images) == pytest.approx([score(name, image)[0] for image in images], rel=1e-6)


def test_many_pictures_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "PIXELS_AT_ONCE", 100)
    seen: list[int] = []

    def mean(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.mean((1, 2, 3))

    images = [noise((6, 5), seed) for seed in range(7)]
    images.insert(3, noise((20, 20)))
    shelf = Shelf(torch.device("cpu"))
    reward = pixels.Formula(load_rewards(["sharpness"], shelf)[0].card, pixels.Pixels.of(shelf), mean)
    expected = [float(np.array(image).mean()) / 255 for image in images]
    assert reward.score(images, [""] * 8).tolist() == pytest.approx(expected, rel=1e-5)
    assert seen == [3, 3, 1, 1]
