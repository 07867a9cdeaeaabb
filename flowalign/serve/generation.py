"""A request for pictures, read: its body within limits and time, its fields within what they can be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from flowalign.errors import allowed
from flowalign.serve.formats import MEDIA
from flowalign.serve.limits import Limits
from flowalign.serve.problems import ClientGone, Problem, refused

T = TypeVar("T")
FIELDS = ("prompt", "n", "size", "response_format", "output_format", "output_compression", "seed", "model")
IGNORED = ("user", "quality", "style", "background", "moderation", "safety_identifier", "stream", "partial_images")
"""Known to OpenAI's clients; the embedded generator has nothing that they could change."""
SEEDS = 2**63


@dataclass(frozen=True)
class Generation:
    """A request that the embedded generator can answer."""

    prompt: str
    n: int = 1
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: what the generator was made for."""
    as_url: bool = False
    format: str = "png"
    compression: int | None = None
    seed: int | None = None
    """Of the first picture; the next ones have the numbers after it."""
    model: str | None = None


async def read_json(request: Request, limit: int, seconds: float) -> dict[str, Any]:
    """The body as a JSON object. Raises Problem: 400, 408, 413, 415; ClientGone."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page can send other types to anybody's machine without being asked
        raise Problem(415, "The body must be JSON: send it with Content-Type: application/json.", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise ClientGone
                data += message.get("body", b"")
                if len(data) > limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise Problem(
            408, f"The body did not arrive in {seconds:g} s.", code="request_timeout", headers={"connection": "close"}
        ) from None
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise refused("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise refused("The body must be a JSON object.", code="invalid_json")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _too_large(limit: int) -> Problem:
    return Problem(413, f"The body has more than {limit} bytes.", code="request_too_large", headers={"connection": "close"})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled when the caller hangs up. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def check_common(body: Mapping[str, Any], limits: Limits) -> None:
    """What holds for both roles: how much is asked for, and no stream of parts. Raises Problem (400)."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise refused("prompt must be a text that is not blank.", param="prompt")
    if len(prompt) > limits.prompt:
        raise refused(f"prompt has {len(prompt)} characters; at most {limits.prompt} are allowed.", param="prompt")
    n = body.get("n")
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= limits.n):
        raise refused(f"n is {_short(n)}; it must be a whole number from 1 to {limits.n}.", param="n")
    if body.get("stream"):
        raise refused("stream is not supported: pictures are answered when they are finished.", param="stream")


def parse(body: Mapping[str, Any], limits: Limits) -> Generation:
    """Raises Problem (400), with the field and what it can be."""
    check_common(body, limits)
    for name in body:
        if name not in FIELDS and name not in IGNORED:
            raise refused(f"{_short(name)} is unknown; {allowed(name, FIELDS)}.", param=name[:100], code="unknown_parameter")
    if body.get("background") == "transparent":
        raise refused("background 'transparent' cannot be drawn; allowed: auto, opaque.", param="background")
    compression, seed = body.get("output_compression"), body.get("seed")
    if compression is not None:
        _whole("output_compression", compression, 0, 100)
    if seed is not None:
        _whole("seed", seed, 0, SEEDS - limits.n)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise refused(f"model is {_short(model)}; it must be a text.", param="model")
    return Generation(
        body["prompt"],
        body.get("n") or 1,
        _size(body.get("size"), limits),
        _choice("response_format", body.get("response_format"), ("b64_json", "url")) == "url",
        _choice("output_format", body.get("output_format"), tuple(sorted(MEDIA, key=lambda name: name != "png"))),
        compression,
        seed,
        model,
    )


def _size(size: Any, limits: Limits) -> tuple[int, int] | None:
    if size is None or size == "auto":
        return None
    parts = size.split("x") if isinstance(size, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and len(part) <= 6 for part in parts):
        raise refused(f"size is {_short(size)}; it must be 'auto' or WIDTHxHEIGHT in pixels, such as '512x512'.", param="size")
    width, height = int(parts[0]), int(parts[1])
    if not 1 <= width * height <= limits.pixels:
        raise refused(f"size is {size}; at most {limits.pixels} pixels are drawn.", param="size")
    return width, height


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of the choices; the first where nothing is said."""
    if value is None:
        return choices[0]
    if value not in choices:
        raise refused(f"{name} is {_short(value)}; {allowed(value, choices)}.", param=name)
    return str(value)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise refused(f"{name} is {_short(value)}; it must be a whole number from {low} to {high}.", param=name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
