"""The embedded generator seen by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from flowalign.errors import ConfigError
from flowalign.serve.app import Generating, make_service
from tests.serve.conftest import draw, inverted
from tests.serve.upstream import decoded, gradient

Client = Callable[..., openai.OpenAI]


def same(data: str, picture: Image.Image, tolerance: int = 0) -> bool:
    found = decoded(base64.b64decode(data))
    return found.size == picture.size and np.abs(np.asarray(found).astype(int) - np.asarray(picture)).max() <= tolerance


def test_pictures_are_those_of_their_prompt_seed_and_size(generator: Callable[..., str], client: Client) -> None:
    made = client(generator())
    answer = made.images.generate(prompt="fox", n=3, size="40x16", extra_body={"seed": 7}, model="gradient", user="u")
    assert (answer.size, answer.output_format) == ("40x16", "png")
    assert time.time() - answer.created < 60
    for place, entry in enumerate(answer.data):
        assert entry.seed == 7 + place
        assert same(entry.b64_json, gradient("fox", 7 + place, (40, 16)))


def test_without_a_seed_each_request_draws_anew_and_says_from_what(generator: Callable[..., str], client: Client) -> None:
    made = client(generator())
    first, second = (made.images.generate(prompt="fox").data[0] for _ in range(2))
    assert first.seed != second.seed
    assert same(first.b64_json, gradient("fox", first.seed))


@pytest.mark.parametrize(("format", "tolerance"), [("png", 0), ("jpeg", 8), ("webp", 8)])
@pytest.mark.parametrize("form", ["b64_json", "url"])
def test_formats_and_forms(generator: Callable[..., str], client: Client, format: str, tolerance: int, form: str) -> None:
    answer = client(generator()).images.generate(
        prompt="fox", response_format=form, output_format=format, extra_body={"seed": 1}
    )
    (entry,) = answer.data
    if form == "url":
        got = httpx.get(entry.url)
        assert got.headers["content-type"] == f"image/{format}"
        data = base64.b64encode(got.content).decode()
    else:
        data = entry.b64_json
    assert decoded(base64.b64decode(data)).format == format.upper()
    assert same(data, gradient("fox", 1), tolerance)


def test_compression_is_the_codecs_quality(generator: Callable[..., str], client: Client) -> None:
    made = client(generator())
    sizes = [
        len(
            made.images.generate(prompt="fox", output_format="jpeg", output_compression=quality, extra_body={"seed": 1})
            .data[0]
            .b64_json
        )
        for quality in (5, 95)
    ]
    assert sizes[0] < sizes[1]


def test_models(generator: Callable[..., str], client: Client) -> None:
    made = client(generator())
    assert [model.id for model in made.models.list()] == ["gradient", "other"]
    assert made.models.retrieve("other").owned_by == "flowalign"
    for ask in (lambda: made.models.retrieve("dall-e-3"), lambda: made.images.generate(prompt="x", model="dall-e-3")):
        with pytest.raises(openai.NotFoundError, match="'gradient', 'other'"):
            ask()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"size": "10"}, "size"),
        ({"size": "0x10"}, "size"),
        ({"size": "9999x9999"}, "size"),
        ({"size": "-1x5"}, "size"),
        ({"size": 5}, "size"),
        ({"response_format": "xml"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"model": 3}, "model"),
        ({"n": 99}, "n"),
        ({"background": "transparent"}, "background"),
        ({"promt": "x"}, "promt"),
    ],
)
def test_what_cannot_be_drawn_is_a_bad_request(
    generator: Callable[..., str], client: Client, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(generator()).images.generate(prompt="fox", extra_body=body)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_what_the_generator_refuses_is_a_bad_request_and_what_breaks_it_an_internal_error(
    generator: Callable[..., str], client: Client
) -> None:
    def moody(prompts: Sequence[str], seeds: Sequence[int], *, size: Any) -> list[Image.Image]:
        if size is not None:
            raise ConfigError("height x width is 7 x 7; both must be multiples of 8 pixels.")
        raise RuntimeError("secret detail")

    made = client(generator(moody))
    with pytest.raises(openai.BadRequestError, match="multiples of 8"):
        made.images.generate(prompt="x", size="7x7")
    with pytest.raises(openai.InternalServerError) as caught:
        made.images.generate(prompt="x")
    assert caught.value.status_code == 500
    assert "secret" not in caught.value.response.text


def test_requests_that_come_together_are_drawn_together_by_size(generator: Callable[..., str]) -> None:
    calls: list[tuple[int, Any]] = []

    def counting(prompts: Sequence[str], seeds: Sequence[int], *, size: Any) -> list[Image.Image]:
        calls.append((len(prompts), size))
        return draw(prompts, seeds, size=size)

    url = generator(counting, batch=8, batch_wait=0.3)

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            sent = [
                client.images.generate(prompt=f"p{i}", size=f"{8 + 8 * (i % 2)}x8", extra_body={"seed": i}) for i in range(6)
            ]
            return await asyncio.gather(*sent)

    for i, answer in enumerate(asyncio.run(ask())):
        assert same(answer.data[0].b64_json, gradient(f"p{i}", i, (8 + 8 * (i % 2), 8)))
    assert sorted(calls) == [(3, (8, 8)), (3, (16, 8))]


def test_a_flow_behind_the_generator(generator: Callable[..., str], client: Client) -> None:
    raw = client(generator(improve=inverted)).images.with_raw_response.generate(prompt="fox", n=2, extra_body={"seed": 3})
    assert raw.headers["x-flowalign"] == "applied"
    for place, entry in enumerate(raw.parse().data):
        assert same(entry.b64_json, Image.fromarray(255 - np.asarray(gradient("fox", 3 + place))))


def test_a_flow_that_fails_leaves_what_was_drawn(generator: Callable[..., str], client: Client) -> None:
    def broken(images: Any, prompts: Any) -> list[Image.Image]:
        raise RuntimeError

    raw = client(generator(improve=broken)).images.with_raw_response.generate(prompt="fox", extra_body={"seed": 3})
    assert raw.headers["x-flowalign"] == "untouched; reason=flow"
    assert same(raw.parse().data[0].b64_json, gradient("fox", 3))


def test_too_much_to_draw_and_no_room_to_keep_are_said_at_once(
    generator: Callable[..., str], post: Callable[..., httpx.Response]
) -> None:
    calls: list[int] = []

    def counting(prompts: Sequence[str], seeds: Sequence[int], *, size: Any) -> list[Image.Image]:
        calls.append(len(prompts))
        return draw(prompts, seeds, size=size)

    url = generator(counting, batch_queue=2, batch_wait=0.2, stored_count=1)
    for body in ({"n": 5}, {"n": 2, "response_format": "url"}):
        got = post(url, {"prompt": "fox"} | body)
        assert (got.status_code, got.json()["error"]["code"]) == (503, "server_busy")
        assert int(got.headers["retry-after"]) >= 1
    assert calls == []


def test_a_diffusers_checkpoint_draws_what_it_draws_alone(serve: Callable[..., str], client: Client, emoji: Path) -> None:
    from flowalign.families.loading import open_checkpoint
    from flowalign.families.sampling import SamplerSettings, sample
    from flowalign.serve.checkpoint import CheckpointGenerator

    pipeline = open_checkpoint(emoji / "tiny-sd")
    settings = SamplerSettings(steps=2, guidance=3.0)
    made = client(serve(make_service(Generating(CheckpointGenerator(pipeline, settings), ("tiny-sd",)))))
    answer = made.images.generate(prompt="a red apple", n=2, size="64x64", extra_body={"seed": 5})
    alone = [picture for seed in (5, 6) for _, picture in sample(pipeline, ["a red apple"], [seed], settings, progress=False)]
    for entry, picture in zip(answer.data, alone, strict=True):
        assert same(entry.b64_json, picture, 1)
    with pytest.raises(openai.BadRequestError, match="multiple"):
        made.images.generate(prompt="a red apple", size="60x60")
