"""Grid peaks: they rise with the strength of a grid, and natural pictures, noise and edges have none."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from flowalign.errors import ConfigError, RunError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring.photographs import photograph, random_picture

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str, **settings: object) -> Reward:
    return load_rewards([{"name": name, **settings}], Shelf(torch.device("cpu")))[0]


def score(reward: Reward, *images: Image.Image) -> list[float]:
    return reward.score(images, ["x"] * len(images)).tolist()


def checks(width: int, height: int) -> NDArray[np.float64]:
    return 2.0 * (np.indices((height, width)).sum(0) % 2) - 1


def seams(width: int, height: int) -> NDArray[np.float64]:
    down, across = np.indices((height, width))
    return ((down % 8 == 0) | (across % 8 == 0)) - 0.23


def blocks(width: int, height: int) -> NDArray[np.float64]:
    return 2.0 * ((np.indices((height, width)) // 4).sum(0) % 2) - 1


def with_grid(image: Image.Image, grid: NDArray[np.float64], strength: float) -> Image.Image:
    array = 20 + np.array(image) * (215 / 255) + strength * grid[:, :, None]  # away from black and white: nothing is clipped
    return Image.fromarray(array.round().astype(np.uint8))


def natural() -> list[Image.Image]:
    """Photographs, shrunk so that the blocks of their own JPEG fall on no grid; parts of them."""
    found = []
    for name in ("china.jpg", "flower.jpg"):
        image = photograph(name)
        smaller = image.resize((int(image.width * 0.7), int(image.height * 0.7)), Image.Resampling.LANCZOS)
        found += [smaller, smaller.crop((100, 20, 356, 276)), image.resize((64, 64), Image.Resampling.LANCZOS)]
    return found


@pytest.mark.parametrize("pattern", [checks, seams, blocks])
def test_grid_peaks_rise_with_the_strength_of_a_grid(pattern: Callable[[int, int], NDArray[np.float64]]) -> None:
    reward = load("grid_peak")
    assert reward.card.sign == -1
    for image in natural():
        grid = pattern(image.width, image.height)
        found = score(reward, *(with_grid(image, grid, strength) for strength in (0, 1, 2, 4, 8, 16)))
        assert found[1:] == sorted(found[1:])  # below one grey level the grid may meet the picture's own phase
        assert found[-1] > found[0] + 0.5
        if image.width > 64:
            assert found[0] < 0.3
            assert found[4] > 1.2  # a grid of 8 levels


def test_natural_pictures_noise_and_flat_ones_have_no_grid() -> None:
    reward = load("grid_peak")
    assert max(score(reward, *natural())) < 0.3
    assert max(score(reward, *(random_picture(size, size) for size in (16, 24, 64, 256)))) < 0.3
    assert score(reward, Image.new("RGB", (64, 64), (9, 80, 200)))[0] == pytest.approx(0, abs=1e-3)


def test_an_edge_is_no_grid() -> None:
    """Upright, level, diagonal and round, sharp, at places that do not fit the picture's period."""
    down, across = np.indices((128, 128))
    for where in (across > 37, down > 51, across + down > 130, across > down + 9, (across - 60) ** 2 + (down - 60) ** 2 < 900):
        image = Image.fromarray(np.where(where, 220, 30).astype(np.uint8)).convert("RGB")
        assert score(load("grid_peak"), image)[0] < 0.7


def test_the_stride_says_which_grid() -> None:
    image = natural()[1]
    thirds = (np.indices((image.height, image.width)).sum(0) % 3 == 0) - 1 / 3
    changed = with_grid(image, thirds, 8)
    assert score(load("grid_peak", stride=3), changed)[0] > 1.5
    assert score(load("grid_peak", stride=8), changed)[0] < 0.3


def test_the_ratio_at_a_lone_peak_is_as_computed_by_hand() -> None:
    """A cosine of the grid on noise: numpy's transform, its power over that of the noise, whose expectation is known."""
    side, stride, amplitude, deviation = 256, 8, 6.0, 8.0
    across = np.indices((side, side))[1]
    noise = np.random.default_rng(0).normal(0, deviation, (side, side))
    y = 128 + amplitude * np.cos(2 * np.pi * across / stride) + noise
    x = torch.from_numpy(y / 255).float().expand(1, 3, side, side)
    expected = (side**2 * amplitude / 2) ** 2 / (side**2 * (deviation**2 + 1 / 12))  # at the frequency and at its negative
    assert abs(np.fft.fft2(y)[0, side // stride]) ** 2 == pytest.approx((side**2 * amplitude / 2) ** 2, rel=0.05)
    found = float(load("grid_peak", stride=stride).score_pixels(x, ["x"]))
    assert found == pytest.approx(math.log10((2 * expected + 61 * (1 + math.exp(-1))) / 63), abs=0.25)


def written_out(image: Image.Image, stride: int) -> float:
    """Frequency by frequency, in numpy; the smooth part is the solution of its discrete Poisson equation."""
    y = np.array(image).astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    rows, columns = y.shape[0] // stride, y.shape[1] // stride
    y = y[: rows * stride, : columns * stride]
    height, width = y.shape
    source = np.zeros_like(y)
    across = y[-stride:].mean(0) - y[:stride].mean(0)
    down = y[:, -stride:].mean(1) - y[:, :stride].mean(1)
    source[0] += across
    source[-1] -= across
    source[:, 0] += down
    source[:, -1] -= down
    q, r = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    poisson = 2 * np.cos(2 * np.pi * q / height) + 2 * np.cos(2 * np.pi * r / width) - 4
    smooth = np.fft.fft2(source) / np.where(poisson == 0, np.inf, poisson)
    power = np.abs(np.fft.fft2(y) - smooth) ** 2
    floor, ratios = height * width / 12, []
    for i in range(-(stride // 2), stride - stride // 2):
        for j in range(-(stride // 2), stride - stride // 2):
            if (i, j) == (0, 0):
                continue
            v, u = i * rows, j * columns
            longest = max(abs(v), abs(u))
            lines = [((1, 0), rows), ((0, 1), columns), ((v / longest, u / longest), min(rows, columns))]
            around = []
            for (toward_v, toward_u), spacing in lines:
                far = range(max(1, spacing // 4), max(1, spacing // 2) + 1)
                steps = [sign * step for step in list(far)[:: -(-len(far) // 8)] for sign in (1, -1)]
                places = [(round(v + step * toward_v) % height, round(u + step * toward_u) % width) for step in steps]
                around.append(np.median([power[place] for place in places]) / np.log(2))
            ratios.append(max(1.0, (power[v % height, u % width] + floor) / (max(around) + floor)))
    return math.log10(np.mean(ratios))


@pytest.mark.parametrize(("size", "stride"), [((40, 35), 8), ((16, 17), 8), ((30, 21), 3), ((160, 144), 8)])
def test_it_is_the_formula_written_out(size: tuple[int, int], stride: int) -> None:
    images = [random_picture(*size), photograph("china.jpg").crop((50, 200, 50 + size[0], 200 + size[1]))]
    images.append(with_grid(images[1], checks(*size), 5))
    found = score(load("grid_peak", stride=stride), *images)
    assert found == pytest.approx([written_out(image, stride) for image in images], abs=1e-3)


@pytest.mark.parametrize("size", [(15, 64), (64, 15), (3, 3)])
def test_too_few_periods_are_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(RunError, match="fewer than two periods of 8"):
        score(load("grid_peak"), random_picture(*size))
    with pytest.raises(ConfigError, match="stride is 1; it must be at least 2"):
        load("grid_peak", stride=1)
