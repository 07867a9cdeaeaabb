"""Natural pictures, and what is done to them."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image


@cache
def photograph(name: str) -> Image.Image:
    """Of 640x427 pixels, of scikit-learn's: "china.jpg" and "flower.jpg"."""
    return Image.fromarray(load_sample_image(name))


def random_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray((np.array(image) + noise).clip(0, 255).round().astype(np.uint8))


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))
