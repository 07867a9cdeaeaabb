"""BRISQUE is the published formula, in scipy, with the package's regression; and what the package itself says."""

from __future__ import annotations

import io
import math
import pickletools
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import optimize, signal, special

from flowalign.errors import CheckpointError, MissingExtraError, RunError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards import brisque
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring.photographs import blurred, noisy, photograph, random_picture
from tests.scoring.test_every_reward import pictures

pytestmark = pytest.mark.usefixtures("one_thread")


def folder() -> Path:
    try:
        return Path(str(metadata.distribution("brisque").locate_file("brisque/models")))
    except metadata.PackageNotFoundError:
        pytest.skip("the package brisque is not installed")


def load(**settings: object) -> Reward:
    folder()
    return load_rewards([{"name": "brisque", **settings}], Shelf(torch.device("cpu")))[0]


def score(*images: Image.Image) -> list[float]:
    return load().score(images, ["x"] * len(images)).tolist()


def statistics(y: NDArray[np.float64]) -> list[float]:
    """The 18 features of one scale, after the paper."""
    axis = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    mean = signal.convolve2d(y, window, "same")
    contrast = (y - mean) / (np.sqrt(np.abs(mean**2 - signal.convolve2d(y**2, window, "same"))) + 1 / 255)
    found: list[float] = []
    neighbours = [
        (contrast[:, :-1], contrast[:, 1:]),
        (contrast[:-1], contrast[1:]),
        (contrast[:-1, :-1], contrast[1:, 1:]),
        (contrast[1:, :-1], contrast[:-1, 1:]),
    ]
    for x in (contrast, *(a * b for a, b in neighbours)):
        left, right = np.sqrt((x[x < 0] ** 2).mean()), np.sqrt((x[x >= 0] ** 2).mean())
        gamma = left / right
        ratio = np.abs(x).mean() ** 2 / (x**2).mean() * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2

        def excess(shape: float, ratio: float = ratio) -> float:
            return special.gamma(2 / shape) ** 2 / (special.gamma(1 / shape) * special.gamma(3 / shape)) - ratio

        shape = (
            optimize.brentq(excess, 0.2, 10, xtol=1e-12) if excess(0.2) < 0 < excess(10) else (10 if excess(10) < 0 else 0.2)
        )
        if x is contrast:
            found += [shape, (left**2 + right**2) / 2]
        else:
            scale = math.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
            mean_of = (right - left) * scale * special.gamma(2 / shape) / special.gamma(1 / shape)
            found += [shape, mean_of, left**2, right**2]
    return found


def halved(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bicubic between pixels 2i and 2i + 1, the edge repeated; Python rounds halves to even, as OpenCV does."""
    height, width = y.shape
    weights = np.array([-0.09375, 0.59375, 0.59375, -0.09375])
    rows, columns = (np.arange(round(n / 2))[:, None] * 2 + np.arange(-1, 3) for n in (height, width))
    y = np.einsum("ikw,k->iw", y[rows.clip(0, height - 1)], weights)
    return np.einsum("hjk,k->hj", y[:, columns.clip(0, width - 1)], weights)


def by_hand(image: Image.Image) -> float:
    y = np.array(image) / 255 @ np.array([0.2125, 0.7154, 0.0721])
    x = np.array(statistics(y) + statistics(halved(y)))
    lowest, highest = ranges()
    x = -1 + 2 * (x - lowest) / (highest - lowest)
    total = 0.0
    head, body = (folder() / "svm.txt").read_text().split("\nSV\n")
    said = dict(line.split() for line in head.splitlines())
    for line in body.splitlines():
        weight, *entries = line.split()
        vector = np.zeros(36)
        for entry in entries:
            index, value = entry.split(":")
            vector[int(index) - 1] = float(value)
        total += float(weight) * math.exp(-float(said["gamma"]) * ((x - vector) ** 2).sum())
    return total - float(said["rho"])


def ranges() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In the package's pickle, whose numbers are read without running it."""
    operations = pickletools.genops((folder() / "normalize.pickle").read_bytes())
    numbers = [argument for code, argument, _ in operations if code.name == "BINFLOAT"]
    return np.array(numbers[:36]), np.array(numbers[36:])


def test_the_ranges_are_the_packages() -> None:
    lowest, highest = ranges()
    assert tuple(lowest) == brisque.LOWEST
    assert tuple(highest) == brisque.HIGHEST


def test_it_is_the_published_formula() -> None:
    images = [photograph("flower.jpg").crop((50, 60, 250, 221)), random_picture(64, 64), random_picture(33, 31)]
    images += [photograph("china.jpg").resize((101, 77)), noisy(photograph("china.jpg").crop((0, 0, 90, 91)), 20)]
    assert score(*images) == pytest.approx([by_hand(image) for image in images], abs=1e-4)


def test_it_is_what_the_package_says() -> None:
    """brisque 0.2.0 with OpenCV 5 and libsvm 3.37, which are not needed here. Where parts of a picture are flat, the package's
    score rests on the signs of rounding errors; there, ours is near and not the same."""
    china, flower = photograph("china.jpg"), photograph("flower.jpg")
    said = {15.794024957953155: flower, 6.039376935806644: china.resize((101, 77)), 16.28442542753416: flower.resize((101, 77))}
    assert score(*said.values()) == pytest.approx(list(said), abs=1e-3)
    low = io.BytesIO()
    china.save(low, "JPEG", quality=10)
    flat_parts = {14.49690040867003: china, 70.48242896384997: Image.open(low)}
    assert score(*flat_parts.values()) == pytest.approx(list(flat_parts), abs=0.5)


def test_distortion_is_worse() -> None:
    assert load().card.sign == -1
    for image in (photograph("china.jpg").crop((200, 100, 500, 350)), photograph("flower.jpg").crop((200, 100, 500, 350))):
        for changed in ([noisy(image, d) for d in (5, 15, 40)], [blurred(image, r) for r in (1, 2, 4)]):
            found = score(image, *changed)
            assert found == sorted(found)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=10)
        before, compressed = score(image, Image.open(file))
        assert compressed > before + 10


def test_the_gradient_is_that_of_the_formula() -> None:
    """In float64, against central differences, at a few pixels: with the gradient of the implicit shape."""
    image = photograph("flower.jpg").crop((200, 150, 232, 178))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double().div(255).requires_grad_()
    measure = load().function  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(measure(x).sum(), x)
    with torch.no_grad():
        for place in ((0, 0, 3, 4), (0, 1, 14, 20), (0, 2, 27, 31)):
            step = torch.zeros_like(x)
            step[place] = 1e-6
            slope = float(measure(x + step) - measure(x - step)) / 2e-6
            assert float(gradient[place]) == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_small_and_flat_pictures() -> None:
    assert all(math.isfinite(each) for each in score(random_picture(3, 3), random_picture(3, 40), random_picture(4, 5)))
    assert all(math.isfinite(each) for each in score(Image.new("RGB", (32, 32), "white"), *pictures()))
    with pytest.raises(RunError, match="at least 3x3 pixels and this one has 2x40"):
        score(random_picture(2, 40))
    with pytest.raises(RunError, match="all black"):
        score(Image.new("RGB", (32, 32)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no model of libsvm"),
        ("svm_type c_svc\nkernel_type rbf\ngamma 1\ntotal_sv 1\nrho 0\nSV\n1 1:1\n", "no epsilon_svr with an rbf kernel"),
        ("svm_type epsilon_svr\nkernel_type rbf\ngamma 1\ntotal_sv 2\nrho 0\nSV\n1 1:1\n", "no epsilon_svr with an rbf kernel"),
        ("svm_type epsilon_svr\nkernel_type rbf\ngamma 1\ntotal_sv 1\nrho 0\nSV\n1 99:1\n", "no model of libsvm"),
    ],
)
def test_another_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "svm.txt").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        load(weights=str(tmp_path / "svm.txt"))
    with pytest.raises(CheckpointError, match="no model of libsvm"):
        load(weights=str(tmp_path / "none.txt"))


def test_a_regression_of_ones_own(tmp_path: Path) -> None:
    """What a line leaves out is 0: far from all vectors only ρ is left, on a vector its weight is added."""
    head = "svm_type epsilon_svr\nkernel_type rbf\ngamma 2\ntotal_sv 2\nrho -3\nSV\n"
    (tmp_path / "svm.txt").write_text(f"{head}5 1:0.5 36:-1\n1 2:100\n")
    regression = brisque.read_regression(tmp_path / "svm.txt")
    x = torch.zeros(3, 36, dtype=torch.float64)
    x[0, 0], x[0, 35], x[1] = 0.5, -1, 50.0
    x[2, 35] = -1
    assert regression(x).tolist() == pytest.approx([8.0, 3.0, 3 + 5 * math.exp(-0.5)])


def test_without_the_package_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    load()

    def gone(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", gone)
    with pytest.raises(MissingExtraError, match=r"flowalign\[quality\]"):
        load_rewards(["brisque"], Shelf(torch.device("cpu")))
