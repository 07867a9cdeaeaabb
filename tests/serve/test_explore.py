"""The page of a steered run: a real model behind it, and a real browser with a mouse in front."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from PIL import Image

from flowalign import cli, runs, steered
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SamplerSettings, sample
from flowalign.serve.access import Access, own_hosts
from flowalign.serve.app import Service
from flowalign.serve.explore import Explored, make_explorer
from flowalign.settings import Config
from tests.browser import CHROMIUM, Browser, chromium
from tests.families.test_steer import STEERED, a_shift, saved

SETTINGS = SamplerSettings(steps=2, guidance=3.0)


@pytest.fixture
def pipeline(folders: dict[str, Path], tmp_path: Path) -> Any:
    """A tiny model that heeds its weights."""
    return steered(open_checkpoint(folders["epsilon"]), saved(tmp_path / "run", STEERED, a_shift(32, 5.0)))


@pytest.fixture
def page(pipeline: Any, serve: Callable[[Service], str]) -> str:
    """Its address."""

    def draw(prompts: Any, seeds: Any, weights: Any) -> list[Image.Image]:
        return [picture for _, picture in sample(pipeline, prompts, seeds, SETTINGS, weights=weights, progress=False)]

    about = Explored("<run>", ("clip", "style"), 'a "cat"')
    return serve(make_explorer(about, draw, Access(hosts=own_hosts("127.0.0.1", None, allow_public=False))))


def drawn(pipeline: Any, prompt: str, seed: int, weights: dict[str, float] | None) -> bytes:
    ((_, picture),) = sample(pipeline, [prompt], [seed], SETTINGS, weights=[weights], progress=False)
    return picture.tobytes()


def test_pictures_are_those_of_the_model_under_the_weights(page: str, pipeline: Any) -> None:
    for weights in ((), (0.25, 0.75), (3.0, 1.0)):
        answer = httpx.get(f"{page}/picture", params={"prompt": "a cat", "seed": 5, "w": list(weights)}, timeout=60)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        told = dict(zip(("clip", "style"), weights, strict=True)) if weights else None
        assert Image.open(io.BytesIO(answer.content)).tobytes() == drawn(pipeline, "a cat", 5, told)


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("prompt=a", "seed must be a whole number"),
        ("prompt=a&seed=-1", "seed must be a whole number"),
        ("prompt=%20&seed=1", "prompt must be a text of 1 to 2000 characters"),
        (f"prompt={'a' * 2001}&seed=1", "prompt must be a text"),
        ("prompt=a&seed=1&w=x&w=1", "w must be a number"),
        ("prompt=a&seed=1&w=1", "w must be there once for each of clip, style, or not at all"),
        ("prompt=a&seed=1&w=-1&w=2", "the weight of clip is -1"),
        ("prompt=a&seed=1&w=nan&w=2", "the weight of clip is nan"),
        ("prompt=a&seed=1&w=0&w=0", "all weights are 0"),
    ],
)
def test_what_cannot_be_drawn_is_said(page: str, query: str, what: str) -> None:
    answer = httpx.get(f"{page}/picture?{query}", timeout=60)
    assert answer.status_code == 400
    assert what in answer.json()["error"]["message"]


def test_only_this_machine_by_its_own_name_is_answered(page: str) -> None:
    assert httpx.get(page, headers={"host": "elsewhere.example"}).status_code == 403
    assert httpx.get(f"{page}/nothing").status_code == 404
    assert httpx.post(f"{page}/picture").status_code == 405
    answer = httpx.get(page)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; img-src 'self'")
    assert "<h1>&lt;run&gt;</h1>" in answer.text


def settled(browser: Browser) -> list[dict[str, str]]:
    """What each picture of the page shows, once all are there."""
    script = (
        "[...document.querySelectorAll('.pictures img')].map(i => "
        "({src: i.src, side: i.dataset.side, late: i.classList.contains('late') || !i.complete || !i.naturalWidth}))"
    )
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found: list[dict[str, str]] = browser.ask(script)
        if not any(each["late"] for each in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"pictures that never came: {found}")


def asked(picture: dict[str, str]) -> dict[str, list[str]]:
    return parse_qs(urlsplit(picture["src"]).query)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_dragging_a_slider_draws_the_pictures_again(page: str, pipeline: Any) -> None:
    with chromium() as browser:
        browser.open(page)
        first = settled(browser)
        assert [each["side"] for each in first] == ["steered"] * 4 + ["plain"] * 4
        assert [asked(each)["seed"] for each in first] == [["0"], ["1"], ["2"], ["3"]] * 2
        assert asked(first[0])["w"] == ["0.500", "0.500"]
        assert "w" not in asked(first[4])
        assert asked(first[0])["prompt"] == ['a "cat"']

        browser.drag("#w1", 0.5, 0.0)
        dragged = settled(browser)
        assert browser.ask("document.getElementById('w1').value") == "0"
        assert browser.ask("[...document.querySelectorAll('output')].map(o => o.value)") == ["1.00", "0.00"]
        assert asked(dragged[0])["w"] == ["1.000", "0.000"]
        assert dragged[4:] == first[4:]
        shown = Image.open(io.BytesIO(httpx.get(dragged[1]["src"], timeout=60).content)).convert("RGB").tobytes()
        assert shown == drawn(pipeline, 'a "cat"', 1, {"clip": 1.0})
        assert shown != drawn(pipeline, 'a "cat"', 1, {"clip": 1.0, "style": 1.0})

        browser.click("#next")
        assert [asked(each)["seed"] for each in settled(browser)] == [["4"], ["5"], ["6"], ["7"]] * 2
        browser.ask("document.getElementById('prompt').select()")
        browser.ask("document.getElementById('prompt').focus()")
        browser.write("a dog")
        assert {asked(each)["prompt"][0] for each in settled(browser)} == {"a dog"}

        browser.drag("#w0", 0.5, 0.0)
        assert all("w" not in asked(each) for each in settled(browser))
        assert browser.ask("document.getElementById('says').textContent").startswith("All sliders are at 0")
        assert browser.problems == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_sliders_of_scores_stand_each_for_itself(pipeline: Any, serve: Callable[[Service], str]) -> None:
    def draw(prompts: Any, seeds: Any, scores: Any) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8)) for _ in prompts]

    about = Explored("run", ("clip", "style"), "a cat", "scores")
    address = serve(make_explorer(about, draw, Access(hosts=own_hosts("127.0.0.1", None, allow_public=False))))
    with chromium() as browser:
        browser.open(address)
        assert asked(settled(browser)[0])["w"] == ["0.500", "0.500"]
        browser.drag("#w1", 0.5, 1.0)
        assert asked(settled(browser)[0])["w"] == ["0.500", "1.000"]
        assert browser.ask("[...document.querySelectorAll('output')].map(o => o.value)") == ["0.50", "1.00"]
        assert browser.ask("document.querySelector('.pictures img').alt") == "a cat, for these scores"
        browser.drag("#w1", 0.9, 0.0)
        browser.drag("#w0", 0.5, 0.0)
        assert all("w" not in asked(each) for each in settled(browser))
        assert browser.ask("document.getElementById('says').textContent") == "All sliders are at 0: drawn without scores."
        assert browser.problems == []


def test_a_run_that_was_not_steered_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explore", str(tmp_path)]) == 2
    assert "holds no steer.safetensors; give the folder of a finished run with a section steer" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["weights", "scores"])
def test_the_command_serves_what_the_run_learned(
    settings: Callable[..., Config], votes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """All of the verb but its last line, which waits for a signal."""
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    for row in rows:
        row |= {side: str(votes.parent / row[side]) for side in ("chosen", "rejected")}
        row |= {"objective_weights": {"red": 1.0, "blue": 0.0}, "scores": {"red": [0.9, 0.1], "blue": [0.2, 0.8]}}
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = [f"steer={{objectives: [red, blue], hidden: 8, condition: {told}}}", "data.validation=null", "train.steps=2"]
    how += ["objective={name: sft}"] if told == "scores" else []
    config = settings(tmp_path / "run", *how, f"data.train={tmp_path / 'told.jsonl'}")
    runs.align(config, progress=False)
    found: list[Service] = []

    def note(service: Service, listening: Any, *, level: str) -> int:
        found.append(service)
        return 0

    from flowalign.serve import process

    monkeypatch.setattr(process, "serve", note)
    result = runs.explore(str(tmp_path / "run"), port=0, steps=1)
    assert result["requests"] == 0
    transport = httpx.ASGITransport(found[0].app)

    async def ask() -> tuple[str, list[httpx.Response]]:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            each = [{"prompt": "a thing", "seed": 1, "w": values} for values in (["1", "1"], ["3", "1"])]
            return (await client.get("/")).text, [await client.get("/picture", params=params, timeout=60) for params in each]

    import asyncio

    text, answers = asyncio.run(ask())
    if told == "weights":  # which may have any scale
        assert [answer.status_code for answer in answers] == [200, 200]
        assert "<h2>Under these weights</h2>" in text
    else:
        assert [answer.status_code for answer in answers] == [200, 400]
        assert "the target of red is 3.0; calibrated scores are from 0 to 1" in answers[1].json()["error"]["message"]
        assert "<h2>For these scores</h2>" in text
        assert "<h2>Without scores</h2>" in text
    assert f'data-told="{told}"' in text
    assert "<span>red</span>" in text
    prompt = json.loads((tmp_path / "run/samples/step-00000002/metadata.jsonl").read_text().splitlines()[0])["prompt"]
    assert f'value="{prompt}"' in text
