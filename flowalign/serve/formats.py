"""Encoded pictures: what they are, whether a flow can move them, and back to what they were."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, JpegImagePlugin

from flowalign.data.images import decode
from flowalign.errors import DataError
from flowalign.serve.limits import Limits

MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = 95
"""Of JPEG and lossy WebP where the picture does not say its own."""


class Untouched(Exception):
    """A picture stays as it came; `str()` of it is the reason in one word."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture and how to encode another like it."""

    image: Image.Image
    """RGB, upright."""
    format: str
    """png, jpeg or webp."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `encode`: quality, colour profile."""


def sniff(data: bytes) -> str | None:
    """png, jpeg or webp, by the first bytes; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


def lossless(data: bytes) -> bool:
    """Whether an encoded picture holds its pixels exactly: PNG and WebP's VP8L."""
    return sniff(data) == "png" or (sniff(data) == "webp" and b"VP8L" in _webp_chunks(data))


def _webp_chunks(data: bytes) -> list[bytes]:
    names, place = [], 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        names.append(name)
        place += 8 + size + size % 2
    return names


def open_picture(data: bytes, limits: Limits) -> Picture:
    """Decode a picture that a flow can move.

    Raises Untouched: `size` (bytes or pixels), `format` (not PNG, JPEG or WebP), `animation`, `transparency`, or `picture`
    (damaged).
    """
    kind = sniff(data)
    if kind is None:
        raise Untouched("format")
    if len(data) > limits.picture:
        raise Untouched("size")
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as source:
            if source.width * source.height > limits.pixels:
                raise Untouched("size")
            if getattr(source, "n_frames", 1) > 1:
                raise Untouched("animation")
            options = _like(source, kind, data)
            if source.has_transparency_data and _lowest_alpha(source) < 255:
                raise Untouched("transparency")
        return Picture(decode(data), kind, options)
    except (Untouched, MemoryError):
        raise
    except DataError:
        raise Untouched("picture") from None
    except Exception:  # Pillow's codecs raise nearly anything on damaged files
        raise Untouched("picture") from None


def _lowest_alpha(source: Image.Image) -> int:
    return int(source.convert("RGBA").getchannel("A").getextrema()[0])  # type: ignore[arg-type]


def _like(source: Image.Image, kind: str, data: bytes) -> dict[str, Any]:
    """What makes another picture be encoded as this one is."""
    options: dict[str, Any] = {}
    if source.info.get("icc_profile") and source.mode in ("RGB", "RGBA"):  # a profile of grey or CMYK does not fit RGB
        options["icc_profile"] = source.info["icc_profile"]
    if kind == "jpeg":
        tables = getattr(source, "quantization", None)
        options |= {"qtables": tables} if tables else {"quality": QUALITY}
        if (sampling := JpegImagePlugin.get_sampling(source)) >= 0:
            options["subsampling"] = sampling
        if source.info.get("progressive"):
            options["progressive"] = True
    elif kind == "webp":
        options |= {"lossless": True} if lossless(data) else {"quality": QUALITY}
    return options


def encode(image: Image.Image, format: str, options: dict[str, Any] | None = None) -> bytes:
    """RGB picture -> png, jpeg or webp."""
    out = io.BytesIO()
    image.convert("RGB").save(out, format=format.upper(), **(options or {}))
    return out.getvalue()


def same_pixels(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
