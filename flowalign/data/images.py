"""Encoded bytes -> an upright RGB picture -> a square of pixels. The same rule for every picture of a comparison."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flowalign.errors import ConfigError, DataError

MAX_PIXELS = 178_000_000
"""A larger picture is taken for a decompression bomb."""


def decode(data: bytes) -> Image.Image:
    """Encoded picture -> RGB, upright as its EXIF orientation says, transparent parts on white, first frame only.

    Raises DataError for what is no picture, is cut short or damaged, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(io.BytesIO(data)) as source:
            width, height = source.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"the picture has {width}x{height} pixels; at most {MAX_PIXELS} are decoded, so shrink it first"
                )
            source.load()
            picture = ImageOps.exif_transpose(source)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"the picture is too large to decode ({error}); at most {MAX_PIXELS} pixels are decoded") from None
    except UnidentifiedImageError:  # whose own words name an address in memory, another one each time
        raise DataError(
            f"{len(data)} bytes are not a readable picture (of no known format); replace the file or remove the row"
        ) from None
    except Exception as error:  # Pillow's codecs raise OSError, SyntaxError, ValueError, struct.error ... on damaged files
        raise DataError(f"{len(data)} bytes are not a readable picture ({error}); replace the file or remove the row") from None
    return flat(picture)


def flat(picture: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB, transparent parts on white."""
    if picture.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fit(
    picture: Image.Image,
    resolution: int,
    *,
    flip: bool = False,
    multiple: int = 1,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """RGB picture of any size -> uint8 `[3, resolution, resolution]`: the centre square, resized with a filter.

    Nothing is stretched and nothing is random, so two pictures of a comparison are always cut alike; `flip` mirrors
    left and right. Raises ConfigError if `resolution` is not a positive multiple of `multiple`.
    """
    check_resolution(resolution, multiple)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.resize((resolution, resolution), resample, box=(left, top, left + side, top + side))
    pixels = np.asarray(square).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[:, :, ::-1] if flip else pixels)


def geometry(picture: Image.Image, resolution: int) -> tuple[int, int, int, int, int, int]:
    """What `fit` does to a picture: its height and width, top and left of the cut after resizing, the square's two sides.

    Mirroring changes nothing: the cut is in the middle.
    """
    side = min(picture.size)
    left, top = ((length - side) // 2 * resolution // side for length in picture.size)
    return picture.height, picture.width, top, left, resolution, resolution


def check_resolution(resolution: int, multiple: int) -> None:
    """Raises ConfigError if pictures of that side cannot be encoded."""
    if resolution < 1 or resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise ConfigError(f"resolution is {resolution}; this model needs a positive multiple of {multiple}, for example {near}")
