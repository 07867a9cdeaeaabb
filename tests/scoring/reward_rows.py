"""One row per reward: how to build a tiny instance of it without the network, and what must score better than what."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring import tiny_models, tiny_towers
from tests.scoring.photographs import blurred, noisy, photograph

Pair = tuple[tuple[Image.Image, str], tuple[Image.Image, str]]
"""A picture with its prompt that is better, and one that is worse."""


@dataclass(frozen=True)
class Row:
    """How the contract battery meets a reward."""

    make: Callable[[Path, Shelf], Reward]
    """Given an empty folder for the files that it needs, and a shelf, an instance; the same one each time it is called."""
    better: Callable[[], list[Pair]] | None = None
    """Pairs that prove its direction; None where the weights are random."""
    tolerance: float = 1e-5
    """How far scores may move with the size of the batch, relative to the largest of them."""
    pixels_tolerance: float | None = None
    """How far `score_pixels` may be from `score` on the same picture, in units of the score; None where it has no gradient
    or reads pixels in a way that cannot be compared."""


def loaded(shelf: Shelf, name: str, **settings: object) -> Reward:
    """As a user names it."""
    return load_rewards([{"name": name, **settings}], shelf)[0]


EMOJI = Path(__file__).resolve().parents[2] / "samples" / "emoji"


@cache
def drawing(caption: str, style: str) -> Image.Image:
    """One of the embedded ones."""
    for row in pq.read_table(EMOJI / "emoji.parquet", columns=["caption", "style", "image"]).to_pylist():
        if (row["caption"], row["style"]) == (caption, style):
            return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    raise LookupError(caption)


def _right_captions() -> list[Pair]:
    fox, tea = drawing("fox", "noto"), drawing("teacup without handle", "fluent")
    return [((fox, "fox"), (tea, "fox")), ((tea, "teacup without handle"), (tea, "fox"))]


def _fluent_first() -> list[Pair]:
    captions = ("fox", "teacup without handle", "bicycle")
    return [((drawing(caption, "fluent"), caption), (drawing(caption, "noto"), caption)) for caption in captions]


def _embedded(folder: Path, shelf: Shelf, column: str) -> Reward:
    rewards = {reward.card.name: reward for reward in load_rewards([str(EMOJI / "rewards.yaml")], shelf)}
    return rewards[column]


def _hpsv2(folder: Path, shelf: Shelf) -> Reward:
    config, checkpoint = tiny_towers.hps_checkpoint(folder)
    return loaded(shelf, "hpsv2", model=str(config), weights=str(checkpoint))


def _formula(name: str) -> Callable[[Path, Shelf], Reward]:
    return lambda folder, shelf: loaded(shelf, name)


def _blurred() -> list[Pair]:
    foxes = [drawing("fox", style) for style in ("noto", "fluent")]
    return [((fox, ""), (fox.filter(ImageFilter.GaussianBlur(2)), "")) for fox in foxes]


def _greyed() -> list[Pair]:
    pictures = drawing("fox", "noto"), drawing("bicycle", "fluent")
    return [((each, ""), (each.convert("L").convert("RGB"), "")) for each in pictures]


def _gridded() -> list[Pair]:
    """A drawing without, and with every fourth column and row a little darker."""
    fox = drawing("fox", "noto")
    pixels = np.array(fox).astype(np.int16)
    pixels[::4] -= 12
    pixels[:, ::4] -= 12
    return [((fox, ""), (Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), ""))]


def _spoilt() -> list[Pair]:
    """A photograph, and the same with noise, out of focus."""
    image = photograph("china.jpg").crop((200, 100, 456, 300))
    return [((image, ""), (worse, "")) for worse in (noisy(image, 25), blurred(image, 2))]


def _imagereward(folder: Path, shelf: Shelf) -> Reward:
    checkpoint, tokenizer = tiny_models.imagereward_checkpoint(folder)
    return loaded(shelf, "imagereward", weights=str(checkpoint), tokenizer=str(tokenizer))


def _compared(folder: Path, shelf: Shelf, name: str, **settings: object) -> Reward:
    _spoilt()[0][0][0].save(folder / "reference.png")
    return loaded(shelf, name, reference=str(folder / "reference.png"), **settings)


def _lpips(folder: Path, shelf: Shelf) -> Reward:
    trunk, weights = tiny_models.alexnet(folder)
    return _compared(folder, shelf, "lpips", trunk=str(trunk), weights=str(weights))


ROWS: dict[str, Row] = {
    "aesthetic": Row(lambda folder, shelf: _embedded(folder, shelf, "style"), _fluent_first, pixels_tolerance=0.5),
    "blip_itm": Row(
        lambda folder, shelf: loaded(shelf, "blip_itm", model=str(tiny_models.blip_retrieval(folder))), pixels_tolerance=0.05
    ),
    "brisque": Row(_formula("brisque"), _spoilt, tolerance=1e-4, pixels_tolerance=1e-3),
    "clip": Row(lambda folder, shelf: _embedded(folder, shelf, "emoji_clip"), _right_captions, pixels_tolerance=0.02),
    "colourfulness": Row(_formula("colourfulness"), _greyed, pixels_tolerance=1e-3),
    "gmsd": Row(lambda folder, shelf: _compared(folder, shelf, "gmsd"), _spoilt, pixels_tolerance=1e-5),
    "grid_peak": Row(_formula("grid_peak"), _gridded, pixels_tolerance=1e-5),
    "imagereward": Row(_imagereward, pixels_tolerance=0.2),
    "jpeg_size": Row(_formula("jpeg_size"), _blurred),
    "lpips": Row(_lpips, _spoilt, pixels_tolerance=1e-4),
    "nsfw": Row(lambda folder, shelf: loaded(shelf, "nsfw", threads=1)),
    "sharpness": Row(_formula("sharpness"), _blurred, pixels_tolerance=1e-6),
    "hpsv2": Row(_hpsv2, pixels_tolerance=1e-4),
    "pickscore": Row(
        lambda folder, shelf: loaded(shelf, "pickscore", model=str(tiny_towers.transformers_clip(folder))),
        pixels_tolerance=0.05,
    ),
    "siglip": Row(
        lambda folder, shelf: loaded(shelf, "siglip", model=str(tiny_towers.transformers_siglip(folder))), pixels_tolerance=0.05
    ),
    "vqascore": Row(lambda folder, shelf: loaded(shelf, "vqascore", model=str(tiny_models.llava(folder)))),
}
