"""Pictures that are nearly the same: re-encoded, resized, slightly cropped, or changed in a detail.

Two steps. A 64-bit hash of each picture, and of its middle after cropping a little, proposes pairs: those that differ in at
most `HASH_BITS` bits, found without comparing all with all. Small versions of the proposed pictures, side by side, decide:
hashes of simple pictures coincide by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_BITS = 7
"""Most bits of 64 in which hashes of near-duplicates differ."""
RMS, LARGEST = 6.0, 36.0
"""Largest root mean square and largest single difference of near-duplicates' small versions, in grey levels of 255."""
CROPS = (0.0, 0.015, 0.03, 0.045, 0.06)
"""Shares that are cut from each side; a crop beyond about the last one is another picture."""
SIDE, SMALL, LOW = 32, 16, 8
BANDS = 4
CHUNK = 1 << 20
MOST = 64
"""Pictures that one is compared with in one look-up: a heap of blank pictures does not take the square of their number."""

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Look:
    """What is kept of a picture."""

    hashes: Hashes
    """`[crops]` of the whole picture and of its crops."""
    small: NDArray[np.uint8]
    """`[crops, SMALL, SMALL, 3]`"""


def look(picture: Image.Image) -> Look:
    """Hashes and small versions of an RGB picture, of any shape: proportions do not count."""
    hashes, small = [], []
    for share in CROPS:
        left, top = share * picture.width, share * picture.height
        box = (left, top, picture.width - left, picture.height - top)
        middle = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box, reducing_gap=4.0)
        hashes.append(dct_hash(middle))
        small.append(np.asarray(middle.resize((SMALL, SMALL), Image.Resampling.BOX)))
    return Look(np.array(hashes, dtype=np.uint64), np.stack(small))


def dct_hash(square: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of the grey picture's cosine transform are above their median.

    The mean brightness does not count. Known as pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image
    Hash Functions").
    """
    grey = np.asarray(square.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    low = (_cosines() @ grey @ _cosines().T).ravel()
    low[0] = np.median(low[1:])
    # Symmetric pictures have frequencies that are zero but for rounding; without a margin their bits would be noise.
    bits = low > np.median(low[1:]) + 1e-6 * np.abs(low).max()
    return int(np.packbits(bits).view(">u8")[0])


@cache
def _cosines() -> NDArray[np.float64]:
    """The first LOW rows of the discrete cosine transform of SIDE numbers (DCT-II), `[LOW, SIDE]`."""
    row, column = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    out = np.cos(np.pi * (column + 0.5) * row / SIDE)
    out.setflags(write=False)
    return out


def close_hashes(
    queries: Hashes, hashes: Hashes, most: int = HASH_BITS
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places (i, j) with `queries[i]` and `hashes[j]` at most `most` bits apart, a chunk at a time; a pair may come again.

    64 bits are four bands of 16. Of two hashes that differ in at most 7 bits, some band differs in at most one: each band is
    looked up as it is and with each of its bits turned, in a sorted list. That takes n log n, and time for what is found.
    Raises ValueError for `most` above 7.
    """
    if not 0 <= most < 2 * BANDS:
        raise ValueError(f"hashes can be searched within 0 to {2 * BANDS - 1} bits, not {most}")
    flips = [0, *(1 << bit for bit in range(16))] if most >= BANDS else [0]
    for band in range(BANDS):
        shift = np.uint64(16 * band)
        keys = ((hashes >> shift) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange((1 << 16) + 1))
        asked = ((queries >> shift) & np.uint64(0xFFFF)).astype(np.int64)
        for flip in flips:
            wanted = asked ^ flip
            first, count = starts[wanted], np.minimum(starts[wanted + 1] - starts[wanted], MOST)
            for begin, end in _chunks(count):
                part = count[begin:end]
                query = np.repeat(np.arange(begin, end), part)
                offset = np.arange(len(query)) - np.repeat(np.cumsum(part) - part, part)
                found = order[np.repeat(first[begin:end], part) + offset]
                near = np.bitwise_count(queries[query] ^ hashes[found]) <= most
                yield query[near], found[near]


def _chunks(count: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Stretches of rows with about CHUNK candidates each."""
    total = np.concatenate([[0], np.cumsum(count)])
    begin = 0
    while begin < len(count):
        end = max(begin + 1, int(np.searchsorted(total, total[begin] + CHUNK, side="right")) - 1)
        yield begin, end
        begin = end


@dataclass(frozen=True)
class Looks:
    """Looks of many pictures, and which of them are compared."""

    hashes: Hashes
    """`[n, crops]`"""
    small: NDArray[np.uint8]
    """`[n, crops, SMALL, SMALL, 3]`, may lie on disk."""
    rows: NDArray[np.int64]
    """Numbers of the pictures that are compared."""


def near_duplicates(looks: Looks) -> NDArray[np.int64]:
    """Pairs `[m, 2]` of near-duplicates among pictures, by number, the smaller first; sorted.

    Two pictures are near-duplicates if the hash of the one and that of the other, or of a crop of the other, lie within
    HASH_BITS, and if the small versions agree, see `alike`.
    """
    pairs = np.sort(_cropped(looks, looks), axis=1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def near_between(a: Looks, b: Looks) -> NDArray[np.int64]:
    """Pairs `[m, 2]` of near-duplicates, the first a picture of `a` and the second one of `b`; sorted."""
    return np.unique(np.concatenate([_cropped(a, b), _cropped(b, a)[:, ::-1]]), axis=0)


def _cropped(a: Looks, b: Looks, part: int = 4096) -> NDArray[np.int64]:
    """Pictures of `a`, whole or cropped, that equal whole ones of `b`: numbers `[m, 2]`."""
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    for crop in range(a.hashes.shape[1]):
        for i, j in close_hashes(a.hashes[a.rows, crop], b.hashes[b.rows, 0]):
            i, j = a.rows[i], b.rows[j]
            if a is b:
                i, j = (i[i < j], j[i < j]) if crop == 0 else (i[i != j], j[i != j])
            for start in range(0, len(i), part):
                left, right = i[start : start + part], j[start : start + part]
                same = alike(a.small[left, crop], b.small[right, 0])
                pairs.append(np.stack([left[same], right[same]], axis=1))
    return np.concatenate(pairs)


def alike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether small versions `[m, SMALL, SMALL, 3]` agree up to RMS and LARGEST, `[m]`."""
    difference = np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(-1).reshape(len(a), SMALL * SMALL)
    return (np.sqrt((difference**2).mean(1)) <= RMS) & (difference.max(1, initial=0) <= LARGEST)
