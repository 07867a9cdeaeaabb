"""`flowalign serve` as a process: its start, its log, its end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from flowalign import cli
from flowalign.serve.app import Generating, Proxying, make_service
from flowalign.serve.child import Child, start
from flowalign.serve.limits import Limits
from flowalign.serve.openapi import document
from flowalign.serve.process import listen
from tests.serve.conftest import draw
from tests.serve.test_trouble import eventually, good
from tests.serve.upstream import Upstream, response

HOUSE_KEY, UPSTREAM_KEY, CALLERS_KEY = "key-of-the-house", "sk-of-the-upstream", "sk-of-a-caller"


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """command("--upstream", url, FLOWALIGN_API_KEY=...): a running `flowalign serve`."""
    with ExitStack() as stack:

        def run(*arguments: str, **environment: str) -> Child:
            child = start(*arguments, log=tmp_path / "serve.log", environment=environment)
            stack.callback(child.process.wait)
            stack.callback(child.process.kill)
            return child

        yield run


def test_work_is_finished_before_the_end_and_no_secret_is_logged(command: Callable[..., Child], upstream: Upstream) -> None:
    release = threading.Event()

    async def wait(writer: asyncio.StreamWriter) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)
        writer.write(response(200, good(), "application/json"))
        await writer.drain()

    made = command(
        "--upstream", upstream.url, "--log-level", "debug", "--url-host", "pictures.example.org",
        FLOWALIGN_API_KEY=HOUSE_KEY, FLOWALIGN_UPSTREAM_KEY=UPSTREAM_KEY,
    )  # fmt: skip
    stranger = openai.OpenAI(base_url=f"{made.address}/v1", api_key=CALLERS_KEY, max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.images.generate(prompt="fox")
    assert upstream.asked == []
    answers: list[Any] = []
    with openai.OpenAI(base_url=f"{made.address}/v1", api_key=HOUSE_KEY, max_retries=0) as client:
        client.images.generate(prompt="fox", extra_query={"sig": "secret-query"}, extra_headers={"api-key": CALLERS_KEY})
        upstream.answer = lambda asked: wait
        thread = threading.Thread(target=lambda: answers.append(client.images.generate(prompt="a fox unheard of")))
        thread.start()
        eventually(lambda: len(upstream.asked) == 2)
        made.process.send_signal(signal.SIGTERM)
        eventually(lambda: not reachable(made.address))
        assert made.process.poll() is None
        release.set()
        thread.join(10)
    (answer,) = answers
    assert answer.data[0].b64_json
    code, out = made.end()
    log = made.log.read_text()
    assert code == 0
    assert json.loads(out)["requests"] >= 3
    assert upstream.asked[0].headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert "POST /v1/images/generations 200" in log
    assert "POST /v1/images/generations 401" in log
    for secret in (HOUSE_KEY, UPSTREAM_KEY, CALLERS_KEY, "secret-query", "unheard"):
        assert secret not in out + log


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def test_who_does_not_finish_is_cut_off_at_the_end_of_patience(command: Callable[..., Child], upstream: Upstream) -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    upstream.answer = lambda asked: never
    made = command("--upstream", upstream.url, "--drain-timeout", "1")
    errors: list[Exception] = []

    def ask() -> None:
        try:
            httpx.post(f"{made.address}/v1/images/generations", json={"prompt": "fox"}, timeout=30.0).raise_for_status()
        except httpx.HTTPError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: len(upstream.asked) == 1)
    assert made.end()[0] == 0
    thread.join(10)
    assert len(errors) == 1


STARTS = """
import sys, time
from pathlib import Path
from flowalign.serve.child import serving

with serving("--upstream", "http://127.0.0.1:1/v1", log=Path(sys.argv[1])) as address:
    print(address, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_server_ends_with_who_started_it_however_that_ends(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", STARTS, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        address = parent.stdout.readline().strip()  # type: ignore[union-attr]
        assert reachable(address)
        parent.send_signal(number)
        parent.wait()
    eventually(lambda: not reachable(address))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("", "there is nothing to serve"),
        ("--generator a --upstream http://b/v1", "give one of them"),
        ("--flow runs/f", "has nothing to move"),
        ("--upstream http://b/v1 --host 0.0.0.0", "FLOWALIGN_API_KEY"),
        ("--upstream ftp://b/v1", "--upstream ftp://b cannot be used"),
        ("--upstream http://b/v1 --url-host https://x", "--url-host"),
        ("--upstream http://b/v1 --flow runs/f --strength 2", "from 0 to 1"),
        ("--upstream http://b/v1 --strength 0.5", "it goes with --flow"),
        ("--upstream http://b/v1 --flow-timeout 0", "flow_timeout is 0"),
        ("--upstream http://b/v1 --port 99999", "from 0 to 65535"),
        ("--upstream http://b/v1 --host 203.0.113.1 --allow-public", "cannot be listened on"),
        ("--rewards nothing", "'nothing' is not one of the rewards"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, part: str
) -> None:
    monkeypatch.delenv("FLOWALIGN_API_KEY", raising=False)
    assert cli.main(["serve", "--port", "0", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert part in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        assert cli.main(["serve", "--upstream", "http://b/v1", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_small_answers_do_not_wait_for_an_acknowledgement() -> None:
    async def run() -> int:
        options: list[int] = []

        def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            made = writer.get_extra_info("socket")
            options.append(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(note, sock=listening):
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                await reader.read()
                writer.close()
        return options[0]

    assert asyncio.run(run()) != 0


def test_it_is_documented_what_it_answers(serve: Callable[..., str], upstream: Upstream) -> None:
    url = serve(make_service(Generating(draw, ("m",))))
    described = httpx.get(f"{url}/openapi.json").json()
    assert described["openapi"] == "3.1.0"

    def valid(schema: str, content: Any) -> None:
        whole = {"$ref": f"#/components/schemas/{schema}", "components": described["components"]}
        jsonschema.Draft202012Validator.check_schema(whole)
        jsonschema.Draft202012Validator(whole).validate(content)

    paths = set(described["paths"])
    assert paths == {
        "/v1/images/generations", "/v1/images/content/{token}", "/v1/models", "/v1/models/{model}",
        "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    body = {"prompt": "fox", "n": 2, "seed": 1, "size": "8x8", "output_format": "jpeg", "response_format": "url"}
    valid("GenerationRequest", body)
    valid("Pictures", httpx.post(f"{url}/v1/images/generations", json=body).json())
    valid("Problem", httpx.post(f"{url}/v1/images/generations", json={"n": 2}).json())
    valid("Models", httpx.get(f"{url}/v1/models").json())
    valid("Model", httpx.get(f"{url}/v1/models/m").json())
    valid("Health", httpx.get(f"{url}/readyz").json())
    for wrong in ({}, {"prompt": ""}, {"prompt": "x", "n": 11}, {"prompt": "x", "output_format": "gif"}):
        with pytest.raises(jsonschema.ValidationError):
            valid("GenerationRequest", wrong)
        assert httpx.post(f"{url}/v1/images/generations", json=wrong).status_code == 400
    assert (
        document("1", Limits(n=3), role="proxy", scores=True)["components"]["schemas"]["GenerationRequest"]["properties"]["n"][
            "maximum"
        ]
        == 3
    )


def test_the_page_loads_nothing_from_elsewhere(serve: Callable[..., str]) -> None:
    got = httpx.get(f"{serve(make_service(Proxying('http://127.0.0.1:1/v1')))}/docs")
    assert got.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<script|src=|https?://", got.text)
    for path in ("/v1/images/generations", "/v1/models/{model}"):
        assert path in got.text
    anchors = set(re.findall(r'href="#(\w+)"', got.text))
    assert anchors
    assert all(f'id="{name}"' in got.text for name in anchors)


@pytest.mark.slow
def test_the_bundled_model_is_served_with_nothing_else(command: Callable[..., Child], emoji: Path) -> None:
    made = command("--generator", str(emoji / "tiny-sd"), "--steps", "2", "--device", "cpu")
    with openai.OpenAI(base_url=f"{made.address}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(prompt="a red apple", n=2, model="tiny-sd", extra_body={"seed": 5})
        assert [entry.seed for entry in answer.data] == [5, 6]
        assert answer.size == "64x64"
    assert made.end()[0] == 0
