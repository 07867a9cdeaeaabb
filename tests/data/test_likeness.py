from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from flowalign.data import likeness
from flowalign.data.images import decode
from flowalign.data.likeness import Looks, alike, close_hashes, dct_hash, look, near_between, near_duplicates


@pytest.fixture(scope="module")
def emoji_pictures(emoji: Path) -> list[Image.Image]:
    """120 emoji of 64 pixels with hard edges on white: the hardest case, since many have one outline."""
    rows = pq.read_table(emoji / "emoji.parquet", columns=["image"]).slice(0, 3000).to_pylist()
    return [decode(row["image"]["bytes"]) for row in rows[::25]]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Twelve parts of two photographs, some of them overlapping by half."""
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [each.crop((x, y, x + 320, y + 320)) for each in whole for x in (0, 160, 320) for y in (0, 100)]


def looks(pictures: list[Image.Image]) -> Looks:
    seen = [look(picture) for picture in pictures]
    hashes, small = np.stack([each.hashes for each in seen]), np.stack([each.small for each in seen])
    return Looks(hashes, small, np.arange(len(pictures)))


def encoded(form: str, quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(picture: Image.Image) -> Image.Image:
        out = io.BytesIO()
        picture.save(out, form, quality=quality)
        return decode(out.getvalue())

    return change


def cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    def change(picture: Image.Image) -> Image.Image:
        width, height = picture.size
        return picture.resize(picture.size, box=(share * width, share * height, (1 - share) * width, (1 - share) * height))

    return change


def resized(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: picture.resize((round(factor * picture.width), round(factor * picture.height)))


COPIES = {
    "jpeg 90": encoded("JPEG", 90),
    "jpeg 60": encoded("JPEG", 60),
    "webp 75": encoded("WEBP", 75),
    "half": resized(0.5),
    "double": resized(2.0),
    "squeezed": lambda picture: picture.resize((picture.width, picture.height * 3 // 4)),
    "cropped 1 %": cropped(0.01),
    "cropped 3 %": cropped(0.03),
    "cropped 6 %": cropped(0.06),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_and_nothing_else(name: str, emoji_pictures: list[Image.Image], photos: list[Image.Image]) -> None:
    for pictures, least in ((emoji_pictures, 0.9), (photos, 1.0)):
        originals, copies = looks(pictures), looks([COPIES[name](picture) for picture in pictures])
        pairs = near_between(originals, copies)
        right = (pairs[:, 0] == pairs[:, 1]).sum()
        assert right >= least * len(pictures)
        assert len(pairs) - right <= 0.02 * len(pictures)


def test_different_pictures_are_not_near_duplicates(emoji_pictures: list[Image.Image], photos: list[Image.Image]) -> None:
    assert len(near_duplicates(looks(photos))) == 0  # though some overlap by half
    assert len(near_duplicates(looks(emoji_pictures))) <= 1
    turned = looks([picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in photos])
    assert len(near_between(looks(photos), turned)) == 0
    blue = looks([Image.merge("RGB", picture.split()[::-1]) for picture in photos])
    assert len(near_between(looks(photos), blue)) == 0
    far = looks([cropped(0.15)(picture) for picture in photos])
    assert len(near_between(looks(photos), far)) == 0


def test_pictures_that_differ_in_a_detail_are_near(emoji: Path) -> None:
    rows = pq.read_table(emoji / "emoji.parquet", columns=["image", "caption", "style"]).to_pylist()
    named = {row["caption"]: decode(row["image"]["bytes"]) for row in rows if row["style"] == "fluent"}
    assert near_duplicates(looks([named["judge"], named["cat face"], named["man judge"], named["cook"]])).tolist() == [[0, 2]]


def test_the_hash_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
    low = dctn(pixels.astype(float), type=2)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    assert dct_hash(Image.fromarray(pixels)) == int("".join(str(int(bit)) for bit in bits), 2)
    brighter = Image.fromarray((pixels // 2 + 60).astype(np.uint8))
    assert (dct_hash(brighter) ^ dct_hash(Image.fromarray(pixels))).bit_count() <= 4


@pytest.mark.parametrize("most", [0, 3, 4, 7])
def test_close_hashes_are_all_that_lie_within_the_bits(most: int) -> None:
    rng = np.random.default_rng(most)
    centres = rng.integers(0, 2**64, 30, dtype=np.uint64)
    hashes = np.repeat(centres, 20)
    for row in range(len(hashes)):  # up to 12 bits turned, wherever they lie
        for bit in rng.choice(64, rng.integers(0, 13), replace=False):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(int(i), int(j)) for i, j in zip(*np.nonzero(apart <= most), strict=True)}
    found = {(int(a), int(b)) for i, j in close_hashes(hashes, hashes, most) for a, b in zip(i, j, strict=True)}
    assert found == expected
    assert len(expected) > len(hashes)


def test_searching_is_not_comparing_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    count = np.bitwise_count

    def counting(values: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(values)
        return count(values)

    monkeypatch.setattr(likeness.np, "bitwise_count", counting)
    hashes = np.random.default_rng(0).integers(0, 2**64, 50_000, dtype=np.uint64)
    assert sum(len(i) for i, _ in close_hashes(hashes, hashes)) >= 50_000
    assert compared < 50_000**2 / 500
    compared = 0
    blank = np.zeros(50_000, dtype=np.uint64)  # a heap of blank pictures
    for _ in close_hashes(blank, blank):
        pass
    assert compared <= 4 * 17 * 50_000 * likeness.MOST


def test_more_bits_than_can_be_searched_are_refused() -> None:
    with pytest.raises(ValueError, match="within 0 to 7 bits, not 8"):
        next(iter(close_hashes(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 8)))


def test_small_versions_must_agree_on_the_whole_and_everywhere() -> None:
    a = np.full((1, 16, 16, 3), 100, dtype=np.uint8)
    assert alike(a, a + np.uint8(6)).all()
    assert not alike(a, a + np.uint8(7)).any()
    b = a.copy()
    b[0, 3, 4] += np.uint8(36)
    assert alike(a, b).all()
    b[0, 3, 4] += np.uint8(1)
    assert not alike(a, b).any()
