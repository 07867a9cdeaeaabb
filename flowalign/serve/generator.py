"""An images API of our own: pictures drawn by a generator in this process."""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flowalign.errors import UserError
from flowalign.serve.backend import Backend, Links
from flowalign.serve.batching import Batcher, Full, Late, Worker
from flowalign.serve.formats import QUALITY, encode
from flowalign.serve.generation import Generation, parse
from flowalign.serve.improver import HEADER, Improver
from flowalign.serve.limits import Limits
from flowalign.serve.metrics import Metrics
from flowalign.serve.problems import Problem, refused
from flowalign.serve.store import PictureStore

Wanted = tuple[str, int, tuple[int, int] | None]


class Draw(Protocol):
    """Draws one RGB picture for each prompt and seed. size: width and height in pixels, None: its own.

    Raises UserError for what it cannot draw.
    """

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, size: tuple[int, int] | None) -> list[Image.Image]: ...


class Embedded(Backend):
    """Pictures of requests that come together are drawn together; each depends on its own seed only."""

    role = "generator"

    def __init__(
        self,
        draw: Draw,
        names: Sequence[str],
        worker: Worker,
        improver: Improver | None,
        limits: Limits,
        metrics: Metrics,
        store: PictureStore,
        links: Links,
    ) -> None:
        """names: what the model is called; the first is the one that is listed."""
        self.names, self.improver, self.limits, self.store, self.links = tuple(names), improver, limits, store, links
        self.metrics = metrics
        self.created = int(time.time())
        self.codecs = ThreadPoolExecutor(2, thread_name_prefix="flowalign-codec")
        self.batcher: Batcher[Wanted, Image.Image] = Batcher(
            lambda items: draw([prompt for prompt, _, _ in items], [seed for _, seed, _ in items], size=items[0][2]),
            worker,
            size=limits.batch,
            wait=limits.batch_wait,
            capacity=limits.batch_queue,
            key=lambda item: item[2],
            seen=lambda count: metrics.batch_pictures.observe(count, "generator"),
        )

    async def generate(self, request: Request, body: dict[str, Any]) -> Response:
        wanted = parse(body, self.limits)
        if wanted.model is not None and wanted.model not in self.names:
            raise self._unknown(wanted.model)
        if wanted.as_url and not self.store.has_room(wanted.n):  # before drawing for nothing
            raise self._full()
        first = secrets.randbits(31) if wanted.seed is None else wanted.seed
        seeds = range(first, first + wanted.n)
        images = await self._draw(wanted, seeds)
        headers = {}
        if self.improver is not None:
            started = time.perf_counter()
            images, outcome = await self.improver.pictures(images, [wanted.prompt] * wanted.n)
            outcome.note(self.metrics)
            self.metrics.flow_seconds.observe(time.perf_counter() - started)
            headers[HEADER] = outcome.header()
        loop = asyncio.get_running_loop()
        encoded = [await loop.run_in_executor(self.codecs, encode, image, wanted.format, _options(wanted)) for image in images]
        entries = [self._entry(data, wanted, request) | {"seed": seed} for data, seed in zip(encoded, seeds, strict=True)]
        size = f"{images[0].width}x{images[0].height}"
        answer = {"created": int(time.time()), "data": entries, "output_format": wanted.format, "size": size}
        return JSONResponse(answer, headers=headers)

    async def _draw(self, wanted: Generation, seeds: Sequence[int]) -> list[Image.Image]:
        deadline = asyncio.get_running_loop().time() + self.limits.generate_timeout
        tasks = [asyncio.ensure_future(self.batcher.submit((wanted.prompt, seed, wanted.size), deadline)) for seed in seeds]
        try:
            return list(await asyncio.gather(*tasks))
        except (Late, Full):
            seconds = max(1, min(60, math.ceil(self.batcher.seconds * (self.batcher.waiting + 1))))
            raise Problem(
                503,
                "The generator has more to do than it can finish in time.",
                code="server_busy",
                headers={"retry-after": str(seconds)},
            ) from None
        except UserError as error:
            raise refused(str(error)) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _entry(self, data: bytes, wanted: Generation, request: Request) -> dict[str, Any]:
        if not wanted.as_url:
            return {"b64_json": base64.b64encode(data).decode("ascii")}
        token = self.store.put(data, wanted.format)
        if token is None:
            raise self._full()
        return {"url": self.links.address(request, token)}

    def _full(self) -> Problem:
        return Problem(
            503,
            "There is no room to keep another picture; ask for response_format b64_json, or later.",
            code="server_busy",
            headers={"retry-after": str(max(1, math.ceil(self.store.wait())))},
        )

    async def models(self, request: Request, model: str | None) -> Response:
        entries = [{"id": name, "object": "model", "created": self.created, "owned_by": "flowalign"} for name in self.names]
        if model is None:
            return JSONResponse({"object": "list", "data": entries})
        for entry in entries:
            if entry["id"] == model:
                return JSONResponse(entry)
        raise self._unknown(model)

    def _unknown(self, model: str) -> Problem:
        known = ", ".join(repr(name) for name in self.names)
        return Problem(404, f"The model {model[:100]!r} is not here; allowed: {known}.", param="model", code="model_not_found")

    async def close(self) -> None:
        self.codecs.shutdown(wait=False, cancel_futures=True)
        if self.improver is not None:
            self.improver.close()


def _options(wanted: Generation) -> dict[str, Any]:
    if wanted.format == "png":
        return {}
    return {"quality": QUALITY if wanted.compression is None else wanted.compression}
