"""An images API to stand behind a proxy: a real server on a loopback socket that can misbehave in every way a test needs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


def gradient(prompt: str, seed: int, size: tuple[int, int] | None = None) -> Image.Image:
    """A smooth picture that depends on all of its arguments."""
    width, height = size or (32, 24)
    digest = hashlib.sha256(f"{prompt}|{seed}".encode()).digest()
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = [digest[c] + (digest[c + 3] - 128) * x * 0.5 + (digest[c + 6] - 128) * y * 0.5 for c in range(3)]
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


def encoded(picture: Image.Image, format: str = "png", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format=format, **options)
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


@dataclass
class Asked:
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Upstream:
    """`answer` decides what is written: bytes, or an async function of the writer; by default it draws gradients."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    answer: Callable[[Asked], Any] | None = None
    format: str = "png"
    options: dict[str, Any] = field(default_factory=dict)
    gone: int = 0
    """Callers who hung up while an answer was written."""

    def pictures(self, asked: Asked) -> list[bytes]:
        body = asked.json()
        return [encoded(gradient(body["prompt"], place), self.format, **self.options) for place in range(body.get("n") or 1)]

    def answered(self, asked: Asked) -> bytes:
        path = asked.target.partition("?")[0]
        if path.startswith("/picture/"):
            prompt, _, place = path.removeprefix("/picture/").partition("/")
            return response(200, encoded(gradient(prompt, int(place)), self.format, **self.options), "image/png")
        if path == "/v1/models":
            return reply({"object": "list", "data": [{"id": "gradient", "object": "model", "created": 1, "owned_by": "test"}]})
        if path.startswith("/v1/models/"):
            return reply({"id": path.removeprefix("/v1/models/"), "object": "model", "created": 1, "owned_by": "test"})
        body, entries = asked.json(), []
        for place, data in enumerate(self.pictures(asked)):
            if body.get("response_format") == "url":
                entries.append({"url": f"{self.url.removesuffix('/v1')}/picture/{body['prompt']}/{place}"})
            else:
                entries.append({"b64_json": base64.b64encode(data).decode(), "revised_prompt": f"{body['prompt']}!"})
        return reply({"created": 1234567890, "data": entries, "usage": {"total_tokens": 7}}, {"x-request-id": "req-up"})


def reply(content: Any, headers: dict[str, str] | None = None, status: int = 200) -> bytes:
    return response(status, json.dumps(content).encode(), "application/json", headers)


def response(status: int, body: bytes, kind: str, headers: dict[str, str] | None = None, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", f"content-type: {kind}", f"content-length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def running(upstream: Upstream) -> Iterator[Upstream]:
    """Serve in a thread of its own until the block ends."""
    loop, ready, state = asyncio.new_event_loop(), threading.Event(), {}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                asked = Asked(*first.split(" ")[:2], headers, body)
                upstream.asked.append(asked)
                made = upstream.answered(asked) if upstream.answer is None else upstream.answer(asked)
                if isinstance(made, bytes):
                    writer.write(made)
                    await writer.drain()
                else:
                    await made(writer)
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            upstream.gone += 1
        except asyncio.CancelledError:  # the server ends
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        state["task"] = asyncio.current_task()
        ready.set()
        with suppress(asyncio.CancelledError):
            await server.serve_forever()

    thread = threading.Thread(target=lambda: _run(loop, main()), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield upstream
    finally:
        loop.call_soon_threadsafe(state["task"].cancel)
        thread.join(10)


def _run(loop: asyncio.AbstractEventLoop, main: Any) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main)
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    finally:
        loop.close()
