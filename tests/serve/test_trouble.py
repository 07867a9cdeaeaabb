"""The proxy in trouble: a real upstream that fails in every way, callers who are slow or leave, a flow that fails or hangs."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from flowalign.serve.process import listen
from tests.serve.conftest import inverted
from tests.serve.upstream import Asked, Upstream, encoded, gradient, reply, response

Client = Callable[..., openai.OpenAI]
Post = Callable[..., httpx.Response]
Proxy = Callable[..., str]


def error(got: httpx.Response) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape."""
    found = got.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert isinstance(found["message"], str)
    return found


def metric(url: str, line: str) -> float:
    (found,) = [each for each in httpx.get(f"{url}/metrics").text.splitlines() if each.startswith(f"{line} ")] or ["x 0"]
    return float(found.rpartition(" ")[2])


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


async def nothing(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


def test_an_upstream_that_does_not_answer_in_time(proxy: Proxy, client: Client, upstream: Upstream) -> None:
    upstream.answer = lambda asked: nothing
    url = proxy(upstream_timeout=0.3)
    with pytest.raises(openai.InternalServerError) as caught:
        client(url, max_retries=2).images.generate(prompt="fox")
    assert caught.value.status_code == 504
    assert caught.value.code == "upstream_timeout"
    assert len(upstream.asked) == 1  # the client would have repeated it twice, and each may be paid for
    assert metric(url, 'flowalign_upstream_failures_total{kind="upstream_timeout"}') == 1


def test_an_upstream_that_is_not_there(proxy: Proxy, client: Client, upstream: Upstream) -> None:
    free = listen("127.0.0.1", 0)
    port = free.getsockname()[1]
    free.close()
    upstream.url = f"http://127.0.0.1:{port}/v1"
    with pytest.raises(openai.InternalServerError) as caught:
        client(proxy()).images.generate(prompt="fox")
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_unreachable")
    assert "x-should-retry" not in caught.value.response.headers  # nothing was drawn: asking again is free


@pytest.mark.parametrize(
    ("status", "kind", "shaped"),
    [
        (400, openai.BadRequestError, True),
        (401, openai.AuthenticationError, True),
        (403, openai.PermissionDeniedError, True),
        (404, openai.NotFoundError, True),
        (409, openai.ConflictError, True),
        (422, openai.UnprocessableEntityError, True),
        (429, openai.RateLimitError, True),
        (429, openai.RateLimitError, False),
        (500, openai.InternalServerError, True),
        (503, openai.InternalServerError, False),
        (529, openai.InternalServerError, True),
    ],
)
def test_errors_of_the_upstream_arrive_as_they_are(
    proxy: Proxy, client: Client, upstream: Upstream, status: int, kind: type[openai.APIStatusError], shaped: bool
) -> None:
    body = {"error": {"message": "no", "type": "some_type", "param": "size", "code": "some_code"}}
    headers = {"retry-after": "17", "x-request-id": "req-up"}
    upstream.answer = lambda asked: (
        reply(body, headers, status) if shaped else response(status, b"<h1>no</h1>", "text/html", headers)
    )
    with pytest.raises(kind) as caught:
        client(proxy()).images.generate(prompt="fox")
    found = caught.value
    assert (type(found), found.status_code, found.request_id) == (kind, status, "req-up")
    assert found.response.headers["retry-after"] == "17"
    if shaped:
        assert found.response.json() == body
        assert (found.code, found.param, found.type) == ("some_code", "size", "some_type")
    else:
        assert str(status) in error(found.response)["message"]


def good(entries: int = 1) -> bytes:
    data = [{"b64_json": base64.b64encode(encoded(gradient("fox", place))).decode()} for place in range(entries)]
    return json.dumps({"created": 1, "data": data}).encode()


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        await writer.drain()


def gzipped(data: bytes, cut: int | None = None) -> bytes:
    return response(200, gzip.compress(data)[:cut], "application/json", {"content-encoding": "gzip"})


def bomb() -> bytes:
    squeeze = zlib.compressobj(9, wbits=31)
    return b"".join([squeeze.compress(b" " * (1 << 20)) for _ in range(64)] + [squeeze.flush()])


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (response(200, good()[:200], "application/json", length=len(good())), "upstream_broken"),
        (response(200, good()[:200], "application/json"), "upstream_invalid"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n20\r\n" + good()[:32], "upstream_broken"),
        (b"HTTP/1.1 200 OK\r\n", "upstream_broken"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "upstream_broken"),
        (b"", "upstream_broken"),
        (response(200, b"<h1>hello</h1>", "text/html"), "upstream_invalid"),
        (response(200, encoded(gradient("x", 0)), "image/png"), "upstream_invalid"),
        (reply({"created": 1}), "upstream_invalid"),
        (reply({"created": 1, "data": []}), "upstream_invalid"),
        (reply({"created": 1, "data": ["text"]}), "upstream_invalid"),
        (response(200, b"[" * 100_000, "application/json"), "upstream_invalid"),
        (response(302, b"", "text/plain", {"location": "http://127.0.0.1:1/"}), "upstream_invalid"),
        (response(200, good(), "application/json", length=1 << 40), "upstream_too_large"),
        (response(200, bomb(), "application/json", {"content-encoding": "gzip"}), "upstream_too_large"),
        (gzipped(good(), cut=-9), "upstream_broken"),
        (response(200, good(), "application/json", {"content-encoding": "br"}), "upstream_invalid"),
        (endless, "upstream_too_large"),
    ],
    ids=[
        "half", "half-but-whole", "half-chunk", "half-headers", "no-http", "nothing", "html", "a-picture", "no-data",
        "empty", "texts", "deep", "redirect", "announced", "bomb", "half-gzip", "brotli", "endless",
    ],
)  # fmt: skip
def test_an_answer_that_is_none(proxy: Proxy, post: Post, upstream: Upstream, answer: Any, code: str) -> None:
    async def once(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    upstream.answer = lambda asked: once if isinstance(answer, bytes) else answer
    got = post(proxy(answer=1 << 20), {"prompt": "fox"})
    assert got.status_code == 502
    assert (error(got)["code"], error(got)["type"]) == (code, "upstream_error")
    assert got.headers["x-should-retry"] == "false"  # it may have been drawn, and paid for
    if answer is endless:
        eventually(lambda: upstream.gone == 1)


@pytest.mark.parametrize(
    "answer", [response(200, good(2), "text/plain"), gzipped(good(2))], ids=["wrong-content-type", "gzip-unasked"]
)
def test_pictures_under_a_wrong_label_have_been_paid_for(proxy: Proxy, post: Post, upstream: Upstream, answer: bytes) -> None:
    upstream.answer = lambda asked: answer
    got = post(proxy(), {"prompt": "fox", "n": 2})
    assert (got.status_code, got.headers["x-flowalign"]) == (200, "applied")
    assert len(got.json()["data"]) == 2


def broken(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    raise RuntimeError("CUDA out of memory")


def one_too_few(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    return list(images)[1:]


def other_size(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    return [image.resize((8, 8)) for image in images]


def slow(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    time.sleep(0.6)
    return inverted(images, prompts)


@pytest.mark.parametrize(
    ("flow", "reason"), [(broken, "flow"), (one_too_few, "flow"), (other_size, "flow"), (slow, "deadline")]
)
@pytest.mark.parametrize("form", ["b64_json", "url"])
def test_a_flow_that_fails_or_is_late_costs_no_picture(
    proxy: Proxy, post: Post, upstream: Upstream, flow: Any, reason: str, form: str
) -> None:
    url = proxy(flow, flow_timeout=0.3 if flow is slow else 5.0)
    got = post(url, {"prompt": "fox", "n": 2, "response_format": form})
    assert got.status_code == 200
    assert got.headers["x-flowalign"] == f"untouched; reason={reason}"
    assert got.content == upstream.answered(upstream.asked[0]).partition(b"\r\n\r\n")[2]
    assert metric(url, f'flowalign_pictures_total{{outcome="untouched",reason="{reason}"}}') == 2


def test_a_flow_that_hangs_delays_nobody_twice(proxy: Proxy, post: Post) -> None:
    release, started = threading.Event(), threading.Event()

    def hanging(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
        started.set()
        release.wait(30)
        return inverted(images, prompts)

    url = proxy(hanging, flow_timeout=1.0)
    assert post(url, {"prompt": "fox"}).headers["x-flowalign"] == "untouched; reason=deadline"
    begun = time.monotonic()
    assert post(url, {"prompt": "fox"}).headers["x-flowalign"] == "untouched; reason=deadline"
    assert time.monotonic() - begun < 0.9  # it was not even tried: the flow has been at the last one for too long
    release.set()
    eventually(lambda: post(url, {"prompt": "fox"}).headers["x-flowalign"] == "applied")


def test_one_picture_that_breaks_the_flow_spoils_no_other(proxy: Proxy) -> None:
    def picky(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
        if "bad" in prompts:
            raise ValueError("bad")
        return inverted(images, prompts)

    url = proxy(picky, batch_wait=0.3)

    async def ask() -> list[str]:
        async with httpx.AsyncClient(timeout=20.0) as made:
            sent = [made.post(f"{url}/v1/images/generations", json={"prompt": name}) for name in ("good", "bad", "fine")]
            return [got.headers["x-flowalign"] for got in await asyncio.gather(*sent)]

    assert asyncio.run(ask()) == ["applied", "untouched; reason=flow", "applied"]


def test_more_pictures_than_may_wait_for_the_flow_go_out_as_they_came(proxy: Proxy, post: Post) -> None:
    got = post(proxy(batch_queue=2, batch_wait=0.2), {"prompt": "fox", "n": 5})
    assert got.headers["x-flowalign"].endswith("reason=busy")
    assert got.headers["x-flowalign"].count(",") == 2  # three of five


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:{other}/picture/x/0", "address"),
        ("http://localhost:{port}/picture/x/0", "address"),
        ("https://127.0.0.1:{port}/picture/x/0", "address"),
        ("http://user@127.0.0.1:{port}/picture/x/0", "address"),
        ("http://127.0.0.1:{port}@evil.example/x", "address"),
        ("http://[::1]:{port}/x", "address"),
        ("http://2130706433:{port}/x", "address"),
        ("file:///etc/passwd", "address"),
        ("gopher://127.0.0.1:{port}/x", "address"),
        ("//127.0.0.1:{port}/picture/x/0", "address"),
        ("https://169.254.169.254/latest/meta-data", "address"),
        ("https://localhost/x", "address"),
        ("http://127.0.0.1:{port}/redirect", "fetch"),
        ("http://127.0.0.1:{port}/missing", "fetch"),
        ("http://127.0.0.1:{port}/endless", "fetch"),
        ("http://127.0.0.1:{port}/never", "fetch"),
        ("http://127.0.0.1:{port}/text", "format"),
    ],
)
def test_a_picture_is_fetched_from_nowhere_else(
    proxy: Proxy, post: Post, upstream: Upstream, address: str, reason: str
) -> None:
    other = socket.create_server(("127.0.0.1", 0))
    other.setblocking(False)
    ports = {"port": upstream.url.split(":")[2].removesuffix("/v1"), "other": other.getsockname()[1]}
    given = address.format(**ports)

    def answer(asked: Asked) -> Any:
        if asked.method == "POST":
            return reply({"created": 1, "data": [{"url": given}]})
        place = f"http://127.0.0.1:{ports['other']}/"
        return {
            "/redirect": response(302, b"", "text/plain", {"location": place}),
            "/missing": response(404, b"", "text/plain"),
            "/endless": endless,
            "/never": nothing,
            "/text": response(200, b"secret", "text/plain"),
        }[asked.target]

    upstream.answer = answer
    url = proxy(source={"url_hosts": ("localhost",)}, picture=1 << 18, fetch_timeout=0.4)
    got = post(url, {"prompt": "fox", "response_format": "url"})
    assert got.status_code == 200
    assert got.headers["x-flowalign"] == f"untouched; reason={reason}"
    assert got.json()["data"] == [{"url": given}]
    if reason == "address":
        assert metric(url, "flowalign_refused_addresses_total") == 1
        assert [asked.method for asked in upstream.asked] == ["POST"]
    with pytest.raises(BlockingIOError):
        other.accept()
    other.close()


def test_a_caller_who_hangs_up_frees_place_and_upstream(proxy: Proxy, client: Client, upstream: Upstream) -> None:
    async def wait(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while not writer.transport.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.02)
        upstream.gone += 1

    upstream.answer = lambda asked: wait
    url = proxy(concurrency=1)
    with pytest.raises(openai.APITimeoutError):
        client(url, timeout=0.4).images.generate(prompt="fox")
    eventually(lambda: upstream.gone == 1)
    upstream.answer = None
    assert client(url).images.generate(prompt="fox").data[0].b64_json
    assert metric(url, 'flowalign_requests_total{route="/v1/images/generations",status="499"}') == 1
    assert metric(url, "flowalign_working_requests") == 0


def test_a_full_queue_sends_callers_away_for_a_while(proxy: Proxy, post: Post, upstream: Upstream) -> None:
    release = threading.Event()

    async def wait(writer: asyncio.StreamWriter) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)
        writer.write(response(200, good(), "application/json"))
        await writer.drain()

    upstream.answer = lambda asked: wait
    url = proxy(concurrency=1, queue=1)
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(post(url, {"prompt": "fox"}))) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: metric(url, "flowalign_waiting_requests") == 1)
    got = post(url, {"prompt": "fox"})
    assert (got.status_code, error(got)["code"]) == (503, "server_busy")
    assert int(got.headers["retry-after"]) >= 1
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}  # these never wait
    release.set()
    for thread in threads:
        thread.join(10)
    assert [got.status_code for got in answers] == [200, 200]
    assert [got.headers["x-flowalign"] for got in answers] == ["applied"] * 2


def test_waiting_ends(proxy: Proxy, post: Post, upstream: Upstream) -> None:
    upstream.answer = lambda asked: nothing
    url = proxy(concurrency=1, queue_timeout=0.2, upstream_timeout=1.5)
    thread = threading.Thread(target=post, args=(url, {"prompt": "fox"}))
    thread.start()
    eventually(lambda: len(upstream.asked) == 1)
    assert post(url, {"prompt": "fox"}).status_code == 503
    thread.join(10)


@pytest.fixture
def raw() -> Callable[..., socket.socket]:
    """raw(address, bytes): a connection that sent these."""

    def connect(url: str, data: bytes) -> socket.socket:
        host, port = url.removeprefix("http://").split(":")
        made = socket.create_connection((host, int(port)), timeout=10)
        made.sendall(data)
        return made

    return connect


HEAD = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


def test_a_caller_who_is_slow_to_ask_is_cut_off(proxy: Proxy, raw: Callable[..., socket.socket]) -> None:
    url = proxy(header_timeout=0.3, body_timeout=0.3)
    with raw(url, b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ") as headers:
        assert headers.recv(100) == b""
    with raw(url, b"") as silent:
        assert silent.recv(100) == b""
    with raw(url, HEAD + b"content-length: 50\r\n\r\n{") as body:
        assert body.recv(100).startswith(b"HTTP/1.1 408 ")
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_caller_who_does_not_read_is_cut_off(proxy: Proxy, upstream: Upstream, raw: Callable[..., socket.socket]) -> None:
    body = json.dumps({"created": 1, "data": [{"b64_json": "", "padding": "x" * (32 << 20)}]}).encode()
    upstream.answer = lambda asked: response(200, body, "application/json")
    url = proxy(send_timeout=0.5)
    with raw(url, HEAD + b"content-length: 16\r\n\r\n" + b'{"prompt":"fox"}') as stuck:
        eventually(lambda: metric(url, 'flowalign_requests_total{route="/v1/images/generations",status="200"}') == 1)
        time.sleep(1.5)
        received = 0
        while chunk := stuck.recv(1 << 20):
            received += len(chunk)
    assert received < 16 << 20  # what the kernel held; the rest was given up
    assert httpx.get(f"{url}/healthz").status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b'{"prompt": NaN}', {}, 400),
        (b"[" * 90_000, {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"prompt": ""}', {}, 400),
        (b'{"prompt": 3}', {}, 400),
        (b'{"n": 1}', {}, 400),
        (b'{"prompt": "x", "n": 11}', {}, 400),
        (b'{"prompt": "x", "n": 0}', {}, 400),
        (b'{"prompt": "x", "n": true}', {}, 400),
        (b'{"prompt": "x", "n": 1.5}', {}, 400),
        (b'{"prompt": "x", "stream": true}', {}, 400),
        (b'{"prompt": "' + b"x" * 32_001 + b'"}', {}, 400),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}', {}, 413),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
    ],
)
def test_what_is_asked_wrongly_is_not_passed_on(
    proxy: Proxy, upstream: Upstream, body: bytes, headers: dict[str, str], status: int
) -> None:
    sent = {"content-type": "application/json"} | headers
    got = httpx.post(f"{proxy(body=100_000)}/v1/images/generations", content=body, headers=sent)
    assert got.status_code == status
    assert error(got)["type"] == "invalid_request_error"
    assert upstream.asked == []


def test_an_endless_request_is_cut(proxy: Proxy, upstream: Upstream, raw: Callable[..., socket.socket]) -> None:
    url = proxy(body=100_000)

    def pour(made: socket.socket) -> None:
        for _ in range(2000):
            made.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
            time.sleep(0.001)

    with raw(url, HEAD + b"transfer-encoding: chunked\r\n\r\n") as made, pytest.raises(ConnectionError):
        pour(made)
    assert upstream.asked == []


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("POST", "/v1/chat/completions"), ("GET", "/v1/images/generations")]
)
def test_what_is_not_there_is_an_error_in_shape(proxy: Proxy, method: str, path: str) -> None:
    got = httpx.request(method, f"{proxy()}{path}")
    assert got.status_code in (404, 405)
    assert error(got)["code"] == "not_found"
