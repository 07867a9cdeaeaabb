"""Servers for tests: all on loopback, all real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from PIL import Image, ImageOps

from flowalign.serve.app import Generating, Proxying, Service, make_service
from flowalign.serve.limits import Limits
from flowalign.serve.process import address, listen, make_server
from tests.serve.upstream import Upstream, gradient, running


def inverted(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    """A flow that nobody can mistake for doing nothing."""
    assert len(images) == len(prompts)
    return [ImageOps.invert(image) for image in images]


def draw(prompts: Sequence[str], seeds: Sequence[int], *, size: tuple[int, int] | None) -> list[Image.Image]:
    return [gradient(prompt, seed, size) for prompt, seed in zip(prompts, seeds, strict=True)]


@pytest.fixture(scope="session")
def ending() -> Iterator[list[threading.Thread]]:
    """Servers that were told to end: looked after when all tests are done, because each takes a while."""
    threads: list[threading.Thread] = []
    yield threads
    for thread in threads:
        thread.join(15)
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def serve(ending: list[threading.Thread]) -> Iterator[Callable[[Service], str]]:
    """serve(service): its address, while it runs in a thread on a socket of its own."""
    servers = []

    def start(service: Service) -> str:
        server, listening = make_server(service), listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append(server)
        ending.append(thread)
        while not server.started:
            time.sleep(0.002)
        return address(listening)

    yield start
    for server in servers:
        server.should_exit = True


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with running(Upstream()) as made:
        yield made


QUICK = {"upstream_timeout": 5.0, "flow_timeout": 5.0, "fetch_timeout": 2.0, "drain_timeout": 2.0}


@pytest.fixture
def proxy(serve: Callable[[Service], str], upstream: Upstream) -> Callable[..., str]:
    """proxy(flow, limit=...): the address of a proxy in front of `upstream`; `service` beside its limits replaces keywords."""

    def start(improve: Any = inverted, *, source: dict[str, Any] | None = None, **limits: Any) -> str:
        parts = Proxying(upstream.url, **(source or {}))
        return serve(make_service(parts, improve=improve, limits=Limits(**QUICK | limits)))

    return start


@pytest.fixture
def generator(serve: Callable[[Service], str]) -> Callable[..., str]:
    """generator(draw, improve=...): the address of a server that draws."""

    def start(function: Any = draw, *, improve: Any = None, **limits: Any) -> str:
        return serve(
            make_service(Generating(function, ("gradient", "other")), improve=improve, limits=Limits(**QUICK | limits))
        )

    return start


@pytest.fixture
def client() -> Iterator[Callable[..., openai.OpenAI]]:
    """client(address): OpenAI's own."""
    with ExitStack() as stack:

        def make(url: str, **options: Any) -> openai.OpenAI:
            options = {"api_key": "sk-callers-own", "max_retries": 0, "timeout": 20.0} | options
            return stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", **options))

        yield make


@pytest.fixture
def post() -> Callable[..., httpx.Response]:
    """post(address, body): plainly to /v1/images/generations."""

    def send(url: str, body: Any, path: str = "/v1/images/generations", **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{url}{path}", json=body, headers=names, timeout=20.0, trust_env=False)

    return send
