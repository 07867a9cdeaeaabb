"""The small parts: metrics, kept pictures, formats, addresses, keys, limits."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from typing import Any

import httpcore
import httpx
import pytest

from flowalign.errors import ConfigError
from flowalign.serve.access import Access, check_bind, is_loopback, own_hosts
from flowalign.serve.addresses import Allowed, CheckedNetwork, NotAllowed, Origin, is_public, origin, redacted
from flowalign.serve.app import Generating, Service, make_service
from flowalign.serve.formats import lossless, sniff
from flowalign.serve.limits import Gate, Limits
from flowalign.serve.metrics import Counter, Histogram, Metrics
from flowalign.serve.problems import Problem
from flowalign.serve.store import PictureStore
from tests.serve.conftest import draw
from tests.serve.upstream import encoded, gradient

LINE = re.compile(
    r'(# (HELP \w+ .+|TYPE \w+ (counter|gauge|histogram))|[a-z_]+(\{([a-z]+="(\\[\\n"]|[^"\\\n])*"(,|(?=\})))+\})? [-+\w.]+)'
)


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.requests.add('/a"b\\c\nd', "200")
    metrics.requests.add("/x", "200", by=2)
    metrics.gauge("stored_bytes", "Bytes.", lambda: 3.5)
    for value in (0.005, 0.2, 1e9):
        metrics.request_seconds.observe(value, "/x")
    text = metrics.render()
    assert text.endswith("\n")
    for line in text.splitlines():
        assert LINE.fullmatch(line), line
    assert r'flowalign_requests_total{route="/a\"b\\c\nd",status="200"} 1' in text
    assert 'flowalign_requests_total{route="/x",status="200"} 2' in text
    assert "flowalign_stored_bytes 3.5" in text
    assert 'flowalign_request_seconds_bucket{route="/x",le="0.005"} 1' in text  # a bound belongs to its bucket
    assert 'flowalign_request_seconds_bucket{route="/x",le="0.25"} 2' in text
    assert 'flowalign_request_seconds_bucket{route="/x",le="+Inf"} 3' in text
    assert 'flowalign_request_seconds_count{route="/x"} 3' in text
    assert 'flowalign_request_seconds_sum{route="/x"} 1000000000.205' in text


def test_buckets_only_grow() -> None:
    histogram = Histogram(["a"], (1.0, 2.0))
    for value in (0.5, 1.5, 1.5, 9.0):
        histogram.observe(value, "x")
    assert histogram.lines("h") == [
        'h_bucket{a="x",le="1"} 1', 'h_bucket{a="x",le="2"} 3', 'h_bucket{a="x",le="+Inf"} 4',
        'h_sum{a="x"} 12.5', 'h_count{a="x"} 4',
    ]  # fmt: skip
    assert Counter().lines("c") == ["c 0"]


def test_kept_pictures_stay_for_their_time_and_no_longer() -> None:
    now = [0.0]
    store = PictureStore(size=10, count=3, seconds=5.0, clock=lambda: now[0])
    first = store.put(b"12345", "png")
    now[0] = 2.0
    second = store.put(b"1234", "jpeg")
    assert first is not None
    assert second is not None
    assert store.put(b"12", "png") is None  # two bytes too many: nothing is dropped for it
    assert (len(store), store.size, store.wait()) == (2, 9, 3.0)
    assert store.has_room(1)
    assert not store.has_room(2)
    assert (store.get(first).data, store.get(second).format) == (b"12345", "jpeg")
    now[0] = 5.0
    assert store.get(first) is None
    assert (len(store), store.size, store.wait()) == (1, 4, 2.0)
    assert store.put(b"123456", "png") is not None
    now[0] = 100.0
    assert (store.wait(), store.size, len(store)) == (0.0, 0, 0)


def test_tokens_cannot_be_guessed() -> None:
    store = PictureStore(size=1000, count=1000, seconds=5.0)
    tokens = {store.put(b"", "png") for _ in range(500)}
    assert len(tokens) == 500
    assert min(len(token) for token in tokens) >= 32


def test_formats_are_told_by_their_bytes() -> None:
    picture = gradient("x", 0)
    for format in ("png", "jpeg", "webp"):
        assert sniff(encoded(picture, format)) == format
    assert sniff(encoded(picture, "gif")) is None
    assert sniff(b"") is None
    assert lossless(encoded(picture))
    assert lossless(encoded(picture, "webp", lossless=True))
    assert lossless(encoded(picture, "webp", lossless=True, exif=b"Exif\x00\x00"))  # within an extended file
    assert not lossless(encoded(picture, "webp", quality=90))
    assert not lossless(encoded(picture, "jpeg"))
    assert not lossless(b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("127.1.2.3", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378::", False),
    ],
)
def test_private_addresses_in_every_disguise(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_only_the_list_and_the_upstream_itself_are_allowed() -> None:
    allowed = Allowed("http://api.internal:9000/v1", ["Pictures.Example.org", "bücher.example"])
    for url in (
        "http://api.internal:9000/x",
        "https://pictures.example.org/a?sig=1",
        "https://PICTURES.example.org.:443/a",
        "https://xn--bcher-kva.example/a",
        "https://bücher.example/a",
    ):
        allowed.check(url)
    for url in (
        "http://api.internal/x",
        "https://api.internal:9000/x",
        "http://pictures.example.org/a",
        "https://pictures.example.org:8443/a",
        "https://pictures.example.org@evil.example/a",
        "https://user:pass@pictures.example.org/a",
        "https://evil.example/pictures.example.org",
        "https://pictures.example.org.evil.example/",
        "https://evil.pictures.example.org/",
        "https://pictures.example.org\\@evil.example/",
        "https://pictures.example.org\n.evil.example/",
        "https://[::1]/",
        "https://pictures.example.org:99999/",
        "ftp://pictures.example.org/",
        "https:///a",
        "",
    ):
        with pytest.raises(NotAllowed):
            allowed.check(url)


@pytest.mark.parametrize("url", ["api.example.org/v1", "ftp://a/v1", "https://key@a/v1", "https://a/v1?key=secret", "https://"])
def test_an_upstream_that_cannot_be_one(url: str) -> None:
    with pytest.raises(ConfigError, match="--upstream") as caught:
        Allowed(url)
    assert "secret" not in str(caught.value)
    assert "key@" not in str(caught.value)


@pytest.mark.parametrize("host", ["https://a.example", "a.example:8443", "a.example/x", "user@a.example", "", "*.a b"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(ConfigError, match="--url-host"):
        Allowed("https://a/v1", [host])


def test_addresses_are_logged_without_what_is_secret() -> None:
    assert redacted("https://user:pass@host:8443/v1/x?sig=1") == "https://host:8443"
    assert origin("https://host/x") == Origin("https", "host", 443)


class Recorder(httpcore.AsyncNetworkBackend):
    """Stands where connections are made; notes where to."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *rest: Any) -> Any:
        self.reached.append((host, port))


def connect(answers: list[list[str]], host: str = "pictures.example.org", port: int = 443) -> list[tuple[str, int]]:
    """Where a connection goes when look-ups of the name answer these, one after the other."""
    network = CheckedNetwork(Origin("http", "upstream.internal", 9000))
    network._network = recorder = Recorder()
    left = iter(answers)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def look_up(*_: Any, **__: Any) -> Any:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(left)]

        loop.getaddrinfo = look_up  # type: ignore[method-assign]
        await network.connect_tcp(host, port, timeout=1.0)

    asyncio.run(run())
    return recorder.reached


def test_a_name_is_resolved_once_and_its_checked_address_is_used() -> None:
    rebinding = [["93.184.216.34"], ["127.0.0.1"]]  # public for a check, private for the connection
    assert connect(rebinding) == [("93.184.216.34", 443)]
    with pytest.raises(NotAllowed, match="private"):
        connect(rebinding[::-1])
    with pytest.raises(NotAllowed, match="private"):
        connect([["93.184.216.34", "10.0.0.1"]])
    assert connect([["10.0.0.1"]], "upstream.internal", 9000) == [("10.0.0.1", 9000)]  # named by whoever started the server
    with pytest.raises(NotAllowed):
        connect([["10.0.0.1"]], "upstream.internal", 22)


def test_keys_are_compared_whole() -> None:
    access = Access("sesame")
    for headers in ({"authorization": "Bearer sesame"}, {"authorization": "bearer  sesame"}, {"x-flowalign-key": "sesame"}):
        access.check("/v1/models", headers)
    for headers in (
        {},
        {"authorization": "Bearer sesam"},
        {"authorization": "Bearer sesame2"},
        {"authorization": "Basic sesame"},
        {"authorization": "sesame"},
        {"x-flowalign-key": ""},
        {"x-flowalign-key": "ſesame"},
        {"x-flowalign-key": "no", "authorization": "Bearer sesame"},
    ):
        with pytest.raises(Problem) as caught:
            access.check("/v1/models", headers)
        assert caught.value.status == 401
        assert "sesame" not in str(caught.value)
    access.check("/healthz", {})
    access.check("/v1/images/content/token", {})
    with pytest.raises(Problem):
        access.check("/metrics", {})
    with pytest.raises(Problem):
        access.check("/v1/images/content", {})
    assert "sesame" not in repr(access)


def test_where_the_callers_key_belongs_to_the_upstream_ours_has_a_header_of_its_own() -> None:
    access = Access("sesame", bearer=False)
    access.check("/v1/models", {"authorization": "Bearer sk", "x-flowalign-key": "sesame"})
    with pytest.raises(Problem, match="x-flowalign-key"):
        access.check("/v1/models", {"authorization": "Bearer sesame"})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_nobody_else_is_served_without_a_key(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    check_bind(host, "key", allow_public=False)
    check_bind(host, None, allow_public=True)
    if loopback:
        check_bind(host, None, allow_public=False)
    else:
        with pytest.raises(ConfigError, match="FLOWALIGN_API_KEY"):
            check_bind(host, None, allow_public=False)


def test_a_web_page_that_points_its_name_here_is_turned_away(serve: Callable[[Service], str]) -> None:
    hosts = own_hosts("127.0.0.1", "https://pictures.example.org/flow", allow_public=False)
    url = serve(make_service(Generating(draw, ("m",)), access=Access(hosts=hosts)))
    for host in ("127.0.0.1:1", "LOCALHOST", "[::1]:80", "pictures.example.org"):
        assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil", ""):
        got = httpx.get(f"{url}/v1/models", headers={"host": host})
        assert (got.status_code, got.json()["error"]["code"]) == (403, "host_not_allowed")
    assert own_hosts("0.0.0.0", None, allow_public=False) is None


@pytest.mark.parametrize(
    ("name", "value"), [("n", 0), ("flow_timeout", 0.0), ("body", -1), ("keep", 1), ("queue", float("nan"))]
)
def test_limits_that_limit_nothing(name: str, value: Any) -> None:
    if name == "keep":
        assert Limits(queue=0, batch_wait=0.0).queue == 0
    else:
        with pytest.raises(ConfigError, match=name):
            Limits(**{name: value})


def test_a_gate_lets_in_by_turns_and_counts() -> None:
    async def run() -> None:
        gate, order = Gate(Limits(concurrency=2, queue=2)), []
        leave = [asyncio.Event() for _ in range(4)]

        async def visit(number: int) -> None:
            async with gate.place():
                order.append(number)
                await leave[number].wait()

        tasks = [asyncio.create_task(visit(number)) for number in range(4)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (order, gate.working, gate.waiting) == ([0, 1], 2, 2)
        with pytest.raises(Problem) as caught:
            await visit(0)
        assert caught.value.status == 503
        tasks[2].cancel()
        await asyncio.sleep(0)
        assert gate.waiting == 1
        leave[1].set()
        await asyncio.sleep(0.01)
        assert order == [0, 1, 3]
        for each in leave:
            each.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (gate.working, gate.waiting) == (0, 0)

    asyncio.run(run())
