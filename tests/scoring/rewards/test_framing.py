"""Preprocessing is the publishers': open_clip's, transformers', and that of HPS v2, for pictures of many sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import InterpolationMode
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flowalign.errors import CheckpointError, RunError
from flowalign.scoring.rewards import open_clip_tower, transformers_tower
from flowalign.scoring.rewards.framing import Framing, normalised
from flowalign.scoring.rewards.hpsv2 import LOOK

CPU = torch.device("cpu")
SIZES = [
    (32, 32),
    (31, 33),
    (64, 40),
    (40, 64),
    (100, 37),
    (37, 107),
    (500, 33),
    (33, 500),
    (16, 16),
    (7, 90),
    (224, 224),
    (71, 50),
]
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


def picture(width: int, height: int) -> Image.Image:
    """Part noise, part ramp: both filters and cuts show."""
    rng = np.random.default_rng(width * 1000 + height)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    noise = rng.uniform(0, 255, (height, width, 3))
    return Image.fromarray(np.where(np.arange(height)[:, None, None] % 7 < 4, ramp, noise).astype(np.uint8))


def ours(framing: Framing, image: Image.Image) -> torch.Tensor:
    return normalised([framing.picture(image)], *framing.statistics(CPU))[0]


@each_size
@pytest.mark.parametrize("fit", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_it_is_open_clips(size: tuple[int, int], fit: str, interpolation: str) -> None:
    config: dict[str, Any] = dict(size=32, interpolation=interpolation, resize_mode=fit, fill_color=90)
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
    framing = open_clip_tower.framing_of(config | {"mean": PreprocessCfg.mean, "std": PreprocessCfg.std})
    torch.testing.assert_close(ours(framing, picture(*size)), theirs(picture(*size)), rtol=0, atol=1e-5)


@each_size
@pytest.mark.parametrize("fit", ["shortest", "longest"])
def test_it_is_open_clips_for_an_oblong_tower(size: tuple[int, int], fit: str) -> None:
    config: dict[str, Any] = dict(size=(32, 20), resize_mode=fit)
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
    framing = open_clip_tower.framing_of(config | {"mean": PreprocessCfg.mean, "std": PreprocessCfg.std})
    torch.testing.assert_close(ours(framing, picture(*size)), theirs(picture(*size)), rtol=0, atol=1e-5)


@each_size
def test_it_is_transformers_clip(size: tuple[int, int]) -> None:
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    found = ours(transformers_tower.framing_of(theirs), picture(*size))
    expected = theirs(picture(*size), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@each_size
def test_it_is_transformers_siglip(size: tuple[int, int]) -> None:
    theirs = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    found = ours(transformers_tower.framing_of(theirs), picture(*size))
    expected = theirs(picture(*size), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_both_processors_of_transformers_say_the_same() -> None:
    sizes: dict[str, Any] = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert transformers_tower.framing_of(CLIPImageProcessor(**sizes)) == transformers_tower.framing_of(
        CLIPImageProcessorPil(**sizes)
    )


@pytest.mark.parametrize("settings", [dict(do_center_crop=False), dict(crop_size={"height": 28, "width": 28})])
def test_a_preprocessing_that_is_neither_is_refused(settings: dict[str, Any]) -> None:
    processor = CLIPImageProcessorPil(**(dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}) | settings))
    with pytest.raises(CheckpointError, match="is not that of CLIP or SigLIP"):
        transformers_tower.framing_of(processor)


@each_size
def test_it_is_that_of_hps(size: tuple[int, int]) -> None:
    """Floats first, then the longer side resized, then black around."""
    image = picture(*size)
    x = vision.to_tensor(image)
    scale = 32 / max(size)
    height, width = (round(side * scale) for side in reversed(size))
    x = vision.resize(x, [height, width], InterpolationMode.BICUBIC, antialias=True) if scale != 1 else x
    left, top = (32 - width) // 2, (32 - height) // 2
    expected = vision.pad(x, [left, top, 32 - width - left, 32 - height - top], fill=0)
    expected = vision.normalize(expected, list(PreprocessCfg.mean), list(PreprocessCfg.std))
    framing = Framing(32, 32, PreprocessCfg.mean, PreprocessCfg.std, **LOOK)
    torch.testing.assert_close(ours(framing, image), expected, rtol=0, atol=1e-5)


@each_size
@pytest.mark.parametrize("fit", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_pixels_are_framed_like_pictures(size: tuple[int, int], fit: Any, resample: str) -> None:
    """Up to Pillow's rounding to bytes, once after each of its two passes: 2 of 255 levels at most, 0.4 on average. Tall
    pictures of noise are further off, since Pillow may begin with the other pass."""
    framing = Framing(32, 32, (0.5,) * 3, (0.5,) * 3, fit, resample)
    image = picture(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    difference = (framing.pixels(pixels)[0] - framing.picture(image).float() / 255).abs() * 255
    tall = size[1] > size[0] and resample == "bicubic"
    assert difference.max() <= (16 if tall else 2)
    assert difference.mean() <= (0.8 if tall else 0.4)


def test_the_resize_has_a_gradient() -> None:
    framing = Framing(8, 8, (0.5,) * 3, (0.5,) * 3)
    pixels = torch.full((1, 3, 19, 24), 0.5).requires_grad_()
    framing.pixels(pixels).sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.sum()) == pytest.approx(3 * 64, rel=1e-4)  # each output pixel's weights add up to 1
    with pytest.raises(RunError, match="lanczos"):
        Framing(8, 8, (0.5,) * 3, (0.5,) * 3, resample="lanczos").pixels(pixels)
