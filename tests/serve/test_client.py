"""The images API as a generator, against a real server on loopback that has its bad days."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowalign.errors import ConfigError, DataError, FlowalignError, RunError
from flowalign.improve_settings import Generator
from flowalign.serve.client import ImagesAPI
from flowalign.serve.limits import Limits


def png(prompt: str) -> bytes:
    """A picture whose colour is the prompt's length."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (len(prompt), 0, 0)).save(out, "PNG")
    return out.getvalue()


class Upstream:
    """Answers by the first of `plan`, then the next; by base64 where that is empty."""

    def __init__(self) -> None:
        self.plan: list[tuple[int, dict[str, str], bytes] | str] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.fetching: list[int] = []  # with which pictures are answered by address, before one that is there
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append(body)
                outer.keys.append(self.headers.get("authorization"))
                do = outer.plan.pop(0) if outer.plan else "b64"
                if isinstance(do, tuple):
                    self.answer(*do)
                elif do == "slow":
                    time.sleep(0.6)
                elif do == "break":
                    self.send_response(200)
                    self.send_header("content-length", "1000")
                    self.end_headers()
                    self.wfile.write(b"half")
                else:
                    data = png(body["prompt"])
                    found = {
                        "b64": {"b64_json": base64.b64encode(data).decode()},
                        "url": {"url": f"{outer.url}/{len(body['prompt'])}"},
                    }
                    entry = found.get(do) or json.loads(do)
                    self.answer(200, {}, json.dumps({"created": 0, "data": [entry]}).encode())

            def do_GET(self) -> None:
                outer.keys.append(self.headers.get("authorization"))
                status = outer.fetching.pop(0) if outer.fetching else 200
                self.answer(status, {"content-type": "image/png"}, png("x" * int(self.path.rsplit("/", 1)[1])))

            def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    found = Upstream()
    yield found
    found.server.shutdown()
    found.server.server_close()


def refusal(status: int, message: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()


@pytest.mark.parametrize("answer", ["b64", "url"])
def test_pictures_come_in_the_order_of_the_prompts(upstream: Upstream, answer: str) -> None:
    upstream.plan = [answer] * 7
    api = ImagesAPI(upstream.url, "m", key="secret", size="8x8", seed_field="seed")
    prompts = ["p" * length for length in (3, 9, 1, 7, 5, 2, 8)]
    found = api(prompts, list(range(7)))
    assert [int(np.asarray(each)[0, 0, 0]) for each in found] == [3, 9, 1, 7, 5, 2, 8]
    asked = sorted(upstream.asked, key=lambda body: body["seed"])
    assert asked[1] == {"model": "m", "prompt": "p" * 9, "n": 1, "size": "8x8", "seed": 1}
    assert upstream.keys.count("Bearer secret") == 7  # pictures are fetched without it
    assert "secret" not in repr(api)


def test_what_asks_to_come_again_is_asked_again(upstream: Upstream) -> None:
    later = {"retry-after": "0"}
    upstream.plan = [*(refusal(status, "later", **later) for status in (429, 425, 503)), "b64"]
    assert len(ImagesAPI(upstream.url, "m")(["p"], [0])) == 1
    assert len(upstream.asked) == 4


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        *((refusal(status, "oh no"), rf"failed \({status}: oh no\)") for status in (408, 409, 500, 502, 503, 504, 524)),
        (refusal(429, "paid", **{"retry-after": "0", "x-should-retry": "false"}), r"failed \(429: paid\)"),
        ("break", r"failed \(RemoteProtocolError: .*\)"),
        ("slow", r"failed \(ReadTimeout: timed out\)"),
    ],
)
def test_a_picture_that_may_have_been_drawn_is_not_asked_for_again(upstream: Upstream, answer: Any, says: str) -> None:
    upstream.plan = [answer]
    with pytest.raises(RunError, match=says + r" and may have drawn the picture all the same, at a price, so it was not"):
        ImagesAPI(upstream.url, "m", timeout=0.3)(["p"], [0])
    assert len(upstream.asked) == 1


def test_fetching_a_picture_is_tried_again(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.serve.client.PATIENCE", 0.0)
    upstream.plan, upstream.fetching = ["url"], [500, 504, 503]
    assert len(ImagesAPI(upstream.url, "m")(["p"], [0])) == 1
    assert (len(upstream.asked), upstream.fetching) == (1, [])


def test_nobody_who_cannot_be_reached_has_drawn(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("flowalign.serve.client.time.sleep", waits.append)
    with pytest.raises(RunError, match=r"did not answer in 3 tries \(ConnectError"):
        ImagesAPI("http://127.0.0.1:9/v1", "m", retries=2)(["p"], [0])
    assert waits == [0.5, 1.0]


def test_it_waits_longer_than_a_server_of_ours_takes() -> None:
    limits = Limits()
    longest = limits.queue_timeout + max(limits.upstream_timeout, limits.generate_timeout) + limits.flow_timeout
    assert ImagesAPI("http://127.0.0.1:9/v1", "m").timeout == Generator.model_fields["timeout"].default > longest


@pytest.mark.parametrize(
    ("plan", "says", "times"),
    [
        ([refusal(401, "bad key")], r"refused \(401: bad key\)", 1),
        ([refusal(429, "slow down", **{"retry-after": "0"})] * 2, r"refused \(429: slow down\)", 2),
        ([(200, {}, b"<html>")], "answered no pictures", 1),
        ([(500, {}, b"oh no")], r"failed \(500: oh no\)", 1),
        ([(302, {"location": "http://10.0.0.1/"}, b"")], r"refused \(302: no reason given\)", 1),
        (['{"b64_json": "no base64"}'], "base64 that is broken", 1),
        (['{"b64_json": "aGVsbG8="}'], "gave a picture that cannot be read", 1),
        (['{"revised_prompt": "x"}'], "without b64_json and url", 1),
        (['{"url": "http://169.254.169.254/latest"}'], "'169.254.169.254', which is not among the hosts", 1),
        (['{"url": "file:///etc/passwd"}'], "which is not among the hosts", 1),
        (["break"], r"failed \(RemoteProtocolError: ", 1),
    ],
)
def test_what_cannot_be_a_picture_is_one_sentence(upstream: Upstream, plan: list[Any], says: str, times: int) -> None:
    upstream.plan = list(plan)
    with pytest.raises(RunError, match=says) as caught:
        ImagesAPI(upstream.url, "m", key="secret", retries=1)(["p"], [0])
    assert len(upstream.asked) == times
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_there_and_wrong_addresses() -> None:
    with pytest.raises(RunError, match="did not answer in 1 tries"):
        ImagesAPI("http://127.0.0.1:9/v1", "m", retries=0)(["p"], [0])
    for wrong in ("api.openai.com", "ftp://x/v1", ""):
        with pytest.raises(ConfigError, match="is not the address of an API"):
            ImagesAPI(wrong, "m")
    for key in ("sk-secret\n", " sk-secret", "sk-secrét"):
        with pytest.raises(ConfigError, match="key of the API cannot be sent") as caught:
            ImagesAPI("http://127.0.0.1:9/v1", "m", key=key)
        assert "sk-" not in str(caught.value)
    with pytest.raises(DataError, match="2 prompts and 1 seeds"):
        ImagesAPI("http://127.0.0.1:9/v1", "m")(["p", "q"], [0])


def test_more_than_is_read_is_refused(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.serve.client.LARGEST", 1000)
    upstream.plan = [(200, {}, b" " * 5000)]
    with pytest.raises(FlowalignError, match="more than 0 MiB"):
        ImagesAPI(upstream.url, "m")(["p"], [0])
