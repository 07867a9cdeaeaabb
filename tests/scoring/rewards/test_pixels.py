"""Rewards that are formulas, written out again in NumPy, and what they must say of pictures that were made for it."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import laplace

from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf
from tests.scoring.reward_rows import drawing

NAMES = ("sharpness", "colourfulness", "jpeg_size", "grid_peak")
SIZES = ((1, 1), (3, 2), (17, 40), (64, 64))


@pytest.fixture(scope="module")
def score():  # type: ignore[no-untyped-def]
    rewards = {reward.card.name: reward for reward in load_rewards(list(NAMES), Shelf(torch.device("cpu")))}
    assert len({id(reward.backbone) for reward in rewards.values()}) == 1  # one decode for all
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


def gridded(image: Image.Image, period: int, strength: float) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64).copy()
    pixels[:, ::period] -= strength
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("period", [2, 4, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_grid_peak_rises_with_the_strength_of_a_grid(score, period: int, turned: bool) -> None:  # type: ignore[no-untyped-def]
    photo = Image.fromarray((128 + 20 * np.random.default_rng(0).normal(size=(80, 96, 3))).clip(0, 255).astype(np.uint8))
    pictures = [gridded(photo, period, strength) for strength in (0, 8, 16, 32, 64)]
    if turned:
        pictures = [each.transpose(Image.Transpose.ROTATE_90) for each in pictures]
    found = score("grid_peak", *pictures)
    assert all(more > less - 0.01 for less, more in pairwise(found))  # a weak grid drowns in the noise
    assert found[-1] > found[-2] > found[0] + 0.1


def test_grid_peak_of_drawings_and_of_noise_is_low(score) -> None:  # type: ignore[no-untyped-def]
    drawings = [drawing(caption, style) for caption in ("fox", "bicycle") for style in ("noto", "fluent")]
    plain = score("grid_peak", *drawings, *(noise((64, 64), seed) for seed in range(4)))
    grid = score("grid_peak", *(gridded(each, 8, 24) for each in drawings))
    assert max(plain) < min(grid)


def test_grid_peak_is_the_ratio_written_out(score) -> None:  # type: ignore[no-untyped-def]
    image = noise((32, 16), 5)
    found = []
    for lines in (luma(image), luma(image).T):
        magnitude = np.abs(np.fft.rfft(lines, norm="forward")).mean(0) + 1e-6
        step, last = lines.shape[1] // 8, len(magnitude) - 1
        for k in range(step, last + 1, step):
            near = [magnitude[n] for n in (k - 3, k - 2, k + 2, k + 3) if 0 < n <= last]
            found.append(np.log10(magnitude[k] / np.sort(near)[(len(near) - 1) // 2]))  # torch's median is the lower one
    assert score("grid_peak", image)[0] == pytest.approx(max(0, *found), abs=1e-4)


def test_pictures_too_small_for_a_grid_have_none(score) -> None:  # type: ignore[no-untyped-def]
    assert score("grid_peak", noise((8, 8)), noise((1, 1))) == [0.0, 0.0]
