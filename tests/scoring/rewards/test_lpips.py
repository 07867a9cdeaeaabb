"""LPIPS is the authors' formula on torchvision's AlexNet, given the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flowalign.errors import CheckpointError, DataError, MissingExtraError, RunError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring import tiny_models
from tests.scoring.test_every_reward import PROMPTS, pictures

pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder: Path, picture: Image.Image, **settings: object) -> Reward:
    picture.save(folder / "reference.png")
    trunk, weights = tiny_models.alexnet(folder)
    spec = {"name": "lpips", "reference": str(folder / "reference.png"), "trunk": str(trunk), "weights": str(weights)}
    return load_rewards([spec | settings], Shelf(torch.device("cpu")))[0]


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def test_it_is_the_published_formula(tmp_path: Path) -> None:
    images = [image.resize((64, 48)) for image in pictures()]
    found = load(tmp_path, images[0]).score(images, PROMPTS)
    state = torch.load(tmp_path / "alexnet.pth", weights_only=True)
    heads = torch.load(tmp_path / "alex.pth", weights_only=True)
    # torchvision's AlexNet, layer by layer, with other widths
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 5, padding=2), nn.ReLU()),
        *(nn.MaxPool2d(3, 2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 10, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(10, 6, 3, padding=1), nn.ReLU()),
    )
    net.load_state_dict({name.removeprefix("features."): value for name, value in state.items() if "features" in name})
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])

    def features(image: Image.Image) -> list[np.ndarray]:
        x = ((np.array(image) / 127.5 - 1 - shift) / scale).transpose(2, 0, 1)
        out, seen = torch.from_numpy(x)[None].float(), []
        for layer in net:
            out = layer(out)
            if isinstance(layer, nn.ReLU):
                seen.append(out[0].detach().double().numpy())
        return seen

    theirs = features(images[0])
    for image, score in zip(images, found.tolist(), strict=True):
        expected = 0.0
        for number, (a, b) in enumerate(zip(features(image), theirs, strict=True)):
            unit = [x / (np.sqrt((x**2).sum(0)) + 1e-10) for x in (a, b)]
            weight = heads[f"lin{number}.model.1.weight"].double().numpy()[0]
            expected += float((weight * (unit[0] - unit[1]) ** 2).sum(0).mean())
        assert score == pytest.approx(expected, abs=1e-5)
    assert float(found[0]) < 1e-10
    assert float(found[1:].min()) > 0.01


def test_layers_are_where_torchvision_has_them() -> None:
    from torchvision.models import alexnet

    from flowalign.scoring.rewards import lpips

    with torch.device("meta"):
        theirs = alexnet(weights=None).features
    for number, (stride, padding) in lpips.CONVOLUTIONS.items():
        layer = theirs[number]
        assert (layer.stride, layer.padding) == ((stride,) * 2, (padding,) * 2)
        assert (number > 0 and isinstance(theirs[number - 1], nn.MaxPool2d)) == (number in lpips.POOLED)


def test_a_reference_of_another_size_is_resized(tmp_path: Path) -> None:
    image = pictures()[0]
    same = load(tmp_path, image).score([image], ["x"])
    larger = load(tmp_path, image.resize((160, 128), Image.Resampling.BICUBIC))
    assert float(same) == 0
    near, far = larger.score([image, pictures()[1].resize((80, 64))], ["x", "x"]).tolist()
    assert near < 0.2 * far


def test_what_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    image = pictures()[0]
    with pytest.raises(RunError, match="at least 31x31 pixels and this one has 40x30"):
        load(tmp_path, image).score([image.resize((40, 30))], ["x"])
    with pytest.raises(DataError, match="reference: a picture's file"):
        load(tmp_path, image, reference=str(tmp_path / "none.png"))
    with pytest.raises(DataError, match="not a readable picture"):
        load(tmp_path, image, reference=str(tmp_path / "alex.pth"))
    with pytest.raises(CheckpointError, match=r"has no lin0\.model"):
        load(tmp_path, image, weights=str(tmp_path / "alexnet.pth"))
    with pytest.raises(CheckpointError, match=r"has no features\.0"):
        load(tmp_path, image, trunk=str(tmp_path / "alex.pth"))
    torch.save({f"lin{n}.model.1.weight": torch.ones(1, 3, 1, 1) for n in range(5)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path, image, weights=str(tmp_path / "other.pth"))


def test_without_the_package_the_file_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def gone(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", gone)
    with pytest.raises(MissingExtraError, match=r"flowalign\[quality\]"):
        load(tmp_path, pictures()[0], weights="")
