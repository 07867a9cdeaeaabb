"""What the proxy adds to a request, and whether it survives an upstream that fails.

    python benchmarks/serve.py overhead           16 clients, an upstream that takes 0.15 to 0.35 s; with and without the proxy
    python benchmarks/serve.py load               500 requests of 16 clients, a fifth of them meeting a fault of the upstream

Everything is on loopback, with a fixed number of requests. Upstream and proxy are processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageOps

CLIENTS = 16
FAULTS = ("429", "500", "slow", "half", "html", "corrupt", "closed", "endless", "deep", "text")
UPSTREAM_TIMEOUT = 1.0


def number(prompt: str) -> int:
    return int(prompt.rpartition(" ")[2])


def delay(prompt: str) -> float:
    """Seconds that the upstream takes, 0.15 to 0.35; the same whoever asks."""
    return 0.15 + 0.2 * int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little") / 2**32


def fault(prompt: str) -> str | None:
    """Which fault a request of the load test meets: every fifth one does."""
    place = number(prompt)
    return FAULTS[place // 5 % len(FAULTS)] if prompt.startswith("load") and place % 5 == 0 else None


def picture(prompt: str, side: int) -> bytes:
    """A PNG of noise that depends on the prompt, as large in bytes as a photograph of that side at most is."""
    rng = np.random.default_rng(number(prompt))
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def http(status: int, body: bytes, kind: str = "application/json", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status} S\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n".encode() + body


def upstream(listening: socket.socket, side: int) -> None:
    """A process that answers like an images API, or does not."""
    fixed = picture("overhead 0", side)

    def answer(data: bytes) -> bytes:
        return json.dumps({"created": 1, "data": [{"b64_json": base64.b64encode(data).decode()}]}).encode()

    ready = answer(fixed)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                prompt = json.loads(await reader.readexactly(length))["prompt"]
                met = fault(prompt)
                await asyncio.sleep(delay(prompt) if prompt.startswith("overhead") else delay(prompt) / 10)
                if met is None:
                    writer.write(http(200, ready if prompt.startswith("overhead") else answer(picture(prompt, side))))
                elif met in ("429", "500"):
                    writer.write(http(int(met), b'{"error": {"message": "no"}}', extra="retry-after: 1\r\n"))
                elif met == "slow":
                    await asyncio.sleep(3 * UPSTREAM_TIMEOUT)
                    return
                elif met == "half":
                    writer.write(http(200, ready)[: len(ready) // 2])
                    return
                elif met == "closed":
                    return
                elif met == "endless":
                    writer.write(b"HTTP/1.1 200 S\r\n\r\n")
                    while True:
                        writer.write(bytes(1 << 16))
                        await writer.drain()
                else:
                    bodies = {
                        "html": (b"<h1>Bad gateway</h1>", "text/html"),
                        "corrupt": (answer(picture(prompt, side)[:-40]), "application/json"),
                        "deep": (b"[" * 100_000, "application/json"),
                        "text": (answer(picture(prompt, side)), "text/plain"),
                    }
                    writer.write(http(200, *bodies[met]))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, sock=listening)
        await server.serve_forever()

    asyncio.run(main())


def inverted(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    return [ImageOps.invert(image) for image in images]


def proxy(listening: socket.socket, url: str, flow: bool) -> None:
    """A process that serves the proxy."""
    from flowalign.serve.app import Proxying, make_service
    from flowalign.serve.limits import Limits
    from flowalign.serve.process import serve

    limits = Limits(upstream_timeout=UPSTREAM_TIMEOUT, answer=8 << 20)
    serve(make_service(Proxying(url), improve=inverted if flow else None, limits=limits), listening, level="error")


@contextmanager
def running(target: Any, *arguments: Any) -> Any:
    """(address, process) of a server on a free port of loopback."""
    from flowalign.serve.process import listen

    listening = listen("127.0.0.1", 0)
    process = multiprocessing.get_context("fork").Process(target=target, args=(listening, *arguments), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", process
    finally:
        process.terminate()
        process.join(10)
        listening.close()


async def ask(url: str, prompts: Sequence[str]) -> list[tuple[str, float, httpx.Response]]:
    """All prompts, by `CLIENTS` clients that each ask one after the other: prompt, seconds, answer."""
    left, done = list(reversed(prompts)), []
    async with httpx.AsyncClient(timeout=30.0, trust_env=False, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def one() -> None:
            while left:
                prompt, started = left.pop(), time.perf_counter()
                got = await client.post(f"{url}/v1/images/generations", json={"prompt": prompt})
                done.append((prompt, time.perf_counter() - started, got))

        await asyncio.gather(*(one() for _ in range(CLIENTS)))
    return done


def overhead(side: int, rounds: int, count: int, flow: bool) -> dict[str, Any]:
    """Medians of a request's time beyond what the upstream sleeps, with and without the proxy, in turns."""
    found: dict[str, list[float]] = {"direct": [], "proxy": []}
    with running(upstream, side) as (direct, _), running(proxy, f"{direct}/v1", flow) as (between, process):
        urls = {"direct": direct, "proxy": between}
        for url in urls.values():
            asyncio.run(ask(url, [f"overhead {place}" for place in range(CLIENTS * 2)]))
        medians = {name: [] for name in urls}
        before = cpu(process.pid)
        for turn in range(rounds):
            prompts = [f"overhead {turn * count + place}" for place in range(count)]
            for name, url in urls.items():
                spent = [seconds - delay(prompt) for prompt, seconds, got in asyncio.run(ask(url, prompts)) if got.is_success]
                found[name] += spent
                medians[name].append(statistics.median(spent))
        spent_by_proxy = cpu(process.pid) - before
    result = {name: 1000 * statistics.median(values) for name, values in found.items()}
    return {
        "requests_each_way": rounds * count,
        "clients": CLIENTS,
        "picture_bytes": len(picture("overhead 0", side)),
        "flow": flow,
        "direct_ms": round(result["direct"], 2),
        "proxy_ms": round(result["proxy"], 2),
        "overhead_ms": round(result["proxy"] - result["direct"], 2),
        "overhead_ms_of_rounds": [round(1000 * (b - a), 2) for a, b in zip(medians["direct"], medians["proxy"], strict=True)],
        "cpu_ms_of_the_proxy": round(1000 * spent_by_proxy / (rounds * count), 2),
        "load_average": os.getloadavg()[0],
    }


def right(prompt: str, got: httpx.Response, side: int) -> bool:
    """Whether an answer is what it has to be for the fault that its request met."""
    met, header = fault(prompt), got.headers.get("x-flowalign")
    if met in ("429", "500"):
        return got.status_code == int(met) and got.headers["retry-after"] == "1"
    if met == "slow":
        return got.status_code == 504 and got.json()["error"]["code"] == "upstream_timeout"
    if met == "endless" and got.status_code == 504:  # on a machine so busy that time ended it before its length did
        return got.headers["x-should-retry"] == "false" and "error" in got.json()
    if met in ("half", "html", "closed", "endless", "deep"):
        return got.status_code == 502 and got.headers["x-should-retry"] == "false" and "error" in got.json()
    data = base64.b64decode(got.json()["data"][0]["b64_json"])
    drawn = picture(prompt, side)
    if met == "corrupt":
        return header == "untouched; reason=picture" and data == drawn[:-40]
    before, after = (np.asarray(Image.open(io.BytesIO(each))) for each in (drawn, data))
    return header == "applied" and bool((after == 255 - before).all())


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu(pid: int) -> float:
    """Seconds of CPU that a process took."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        parts = file.read().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def load(side: int, count: int) -> dict[str, Any]:
    """Every request is answered, none wrongly; the proxy's memory after each fifth of them."""
    prompts = [f"load {place}" for place in range(count)]
    statuses: Counter[str] = Counter()
    wrong, memory = [], []
    with running(upstream, side) as (direct, _), running(proxy, f"{direct}/v1", True) as (between, process):
        asyncio.run(ask(between, [f"load {count + place}" for place in range(100)]))  # each fault twice
        memory.append(round(resident(process.pid), 1))
        started = time.perf_counter()
        for start in range(0, count, count // 5):
            for prompt, _, got in asyncio.run(ask(between, prompts[start : start + count // 5])):
                statuses[str(got.status_code)] += 1
                if not right(prompt, got, side):
                    wrong.append((prompt, fault(prompt), got.status_code, dict(got.headers)))
            memory.append(round(resident(process.pid), 1))
        seconds = time.perf_counter() - started
        metrics = httpx.get(f"{between}/metrics", trust_env=False).text
    return {
        "requests": count,
        "faults": sum(fault(prompt) is not None for prompt in prompts),
        "answered": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "wrong": wrong,
        "seconds": round(seconds, 1),
        "memory_mib": memory,
        "left_working": [line for line in metrics.splitlines() if line.startswith("flowalign_working_requests ")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "load"))
    parser.add_argument("--side", type=int, help="pixels of a picture's side; by default 256 for overhead, 64 for load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, help="requests; by default 160 a round for overhead, 500 for load")
    parser.add_argument("--flow", action="store_true", help="overhead with a flow that inverts colours")
    options = parser.parse_args()
    if options.what == "overhead":
        found = overhead(options.side or 256, options.rounds, options.count or 160, options.flow)
    else:
        found = load(options.side or 64, options.count or 500)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
