"""The proxy seen by OpenAI's own client: same calls, same answers, other pictures."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image, ImageCms, ImageOps

from flowalign.serve.upstream import ANSWERED_WITH
from tests.serve.conftest import inverted
from tests.serve.upstream import Upstream, decoded, encoded, gradient, reply


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def b64(entry: Any) -> bytes:
    return base64.b64decode(entry.b64_json)


def test_every_picture_is_moved_and_the_rest_of_the_answer_stays(
    proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream
) -> None:
    raw = client(proxy()).images.with_raw_response.generate(prompt="a fox", n=3, model="gradient", user="u", size="auto")
    assert raw.headers["x-flowalign"] == "applied"
    assert raw.headers["x-request-id"] == "req-up"
    answer = raw.parse()
    assert (answer.created, answer.usage.total_tokens) == (1234567890, 7)
    assert [entry.revised_prompt for entry in answer.data] == ["a fox!"] * 3
    for place, entry in enumerate(answer.data):
        assert decoded(b64(entry)).format == "PNG"
        assert (pixels(decoded(b64(entry))) == 255 - pixels(gradient("a fox", place))).all()
    (asked,) = upstream.asked
    assert asked.json() == {"prompt": "a fox", "n": 3, "model": "gradient", "user": "u", "size": "auto"}
    assert asked.headers["authorization"] == "Bearer sk-callers-own"


def test_the_asynchronous_client_gets_the_same(proxy: Callable[..., str]) -> None:
    url = proxy()

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            return await asyncio.gather(*(client.images.generate(prompt=f"p{i}", n=2) for i in range(6)))

    for i, answer in enumerate(asyncio.run(ask())):
        for place, entry in enumerate(answer.data):
            assert (pixels(decoded(b64(entry))) == 255 - pixels(gradient(f"p{i}", place))).all()


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [("png", {}, 0), ("webp", {"lossless": True}, 0), ("webp", {"quality": 90}, 6), ("jpeg", {"quality": 90}, 6)],
)
def test_pictures_come_back_in_the_format_that_the_upstream_chose(
    proxy: Callable[..., str],
    client: Callable[..., openai.OpenAI],
    upstream: Upstream,
    format: str,
    options: dict[str, Any],
    tolerance: int,
) -> None:
    upstream.format, upstream.options = format, options
    (entry,) = client(proxy()).images.generate(prompt="fox").data
    before, after = decoded(encoded(gradient("fox", 0), format, **options)), decoded(b64(entry))
    assert after.format == before.format == format.upper()
    assert np.abs(pixels(after) - (255 - pixels(before))).max() <= tolerance
    if format == "jpeg":
        assert after.quantization == before.quantization


def test_a_url_becomes_one_of_ours_and_is_served(
    proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream
) -> None:
    url = proxy()
    answer = client(url).images.generate(prompt="fox", n=2, response_format="url")
    for place, entry in enumerate(answer.data):
        assert entry.b64_json is None
        assert entry.url.startswith(f"{url}/v1/images/content/")
        got = httpx.get(entry.url)  # without a key, as with other image APIs
        assert got.headers["content-type"] == "image/png"
        assert (pixels(decoded(got.content)) == 255 - pixels(gradient("fox", place))).all()
    fetched = [asked for asked in upstream.asked if asked.target.startswith("/picture/")]
    assert len(fetched) == 2
    assert not any("authorization" in asked.headers for asked in fetched)
    assert httpx.get(f"{url}/v1/images/content/guess").status_code == 404


def test_kept_pictures_expire_and_are_bounded(proxy: Callable[..., str], client: Callable[..., openai.OpenAI]) -> None:
    url = proxy(stored_count=2, stored_seconds=0.4)
    raw = client(url).images.with_raw_response.generate(prompt="fox", n=3, response_format="url")
    assert raw.headers["x-flowalign"] in {f"partial; untouched={place}; reason=store" for place in range(3)}
    addresses = [entry.url for entry in raw.parse().data]
    ours = [each for each in addresses if each.startswith(url)]
    assert len(ours) == 2
    assert all(httpx.get(each).status_code == 200 for each in addresses)  # the third is the upstream's own, untouched

    async def wait() -> None:
        while httpx.get(ours[0]).status_code == 200:
            await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(wait(), 5))
    assert client(url).images.generate(prompt="fox", n=2, response_format="url").data[1].url.startswith(url)


def test_models_are_the_upstreams(proxy: Callable[..., str], client: Callable[..., openai.OpenAI]) -> None:
    made = client(proxy())
    assert [model.id for model in made.models.list()] == ["gradient"]
    assert made.models.retrieve("gradient").id == "gradient"


def test_without_a_flow_the_answer_is_the_upstreams_byte_for_byte(
    proxy: Callable[..., str], post: Callable[..., httpx.Response], upstream: Upstream
) -> None:
    got = post(proxy(None), {"prompt": "fox", "n": 2})
    assert got.headers["x-flowalign"] == "untouched; reason=no-flow"
    assert got.content == upstream.answered(upstream.asked[0]).partition(b"\r\n\r\n")[2]


def test_only_named_headers_pass_in_either_direction(
    proxy: Callable[..., str], post: Callable[..., httpx.Response], upstream: Upstream
) -> None:
    passed = {
        "x-ratelimit-remaining-requests": "9",
        "openai-processing-ms": "12",
        "retry-after": "3",
        "x-should-retry": "false",
    }
    kept = {"set-cookie": "a=b", "server": "secret", "x-flowalign": "forged", "x-powered-by": "tests"}
    upstream.answer = lambda asked: reply({"created": 1, "data": [{"b64_json": ""}]}, passed | kept)
    sent = {"cookie": "c=d", "x_forwarded_for": "1.2.3.4", "openai_project": "p", "api_key": "azure", "x_flowalign_key": "ours"}
    got = post(proxy(), {"prompt": "fox"}, **sent)
    assert {name: got.headers[name] for name in passed} == passed
    assert got.headers["x-flowalign"] == "untouched; reason=format"
    assert not {"set-cookie", "x-powered-by"} & set(got.headers)
    assert "secret" not in str(got.headers)
    (asked,) = upstream.asked
    assert (asked.headers["openai-project"], asked.headers["api-key"]) == ("p", "azure")
    assert not {"cookie", "x-forwarded-for", "x-flowalign-key"} & set(asked.headers)
    assert all(name.startswith(ANSWERED_WITH) for name in passed)


def test_headers_that_are_not_ascii_pass_as_they_are(proxy: Callable[..., str], upstream: Upstream) -> None:
    upstream.answer = lambda asked: reply({"created": 1, "data": [{"b64_json": ""}]}, {"x-request-id": "é"})
    sent = {b"user-agent": "füchse".encode("latin-1"), b"content-type": b"application/json"}
    got = httpx.post(f"{proxy()}/v1/images/generations", content=b'{"prompt": "fox \\ud800"}', headers=list(sent.items()))
    assert got.status_code == 200
    assert upstream.asked[0].headers["user-agent"] == "füchse"
    assert upstream.asked[0].json()["prompt"] == "fox \ud800"
    assert dict(got.headers.raw)[b"x-request-id"] == "é".encode()


def test_a_key_of_the_proxy_for_the_upstream_replaces_the_callers(
    proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream
) -> None:
    client(proxy(source={"key": "sk-of-the-house"})).images.generate(prompt="fox", extra_headers={"api-key": "mine"})
    assert upstream.asked[0].headers["authorization"] == "Bearer sk-of-the-house"
    assert "api-key" not in upstream.asked[0].headers


def test_a_query_passes(proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream) -> None:
    client(proxy()).images.generate(prompt="fox", extra_query={"api-version": "2026-01-01"})
    assert upstream.asked[0].target == "/v1/images/generations?api-version=2026-01-01"


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("data", "header"),
    [
        (encoded(gradient("x", 0), icc_profile=PROFILE), "applied"),
        (encoded(gradient("x", 0).convert("RGBA")), "applied"),
        (encoded(gradient("x", 0).convert("L")), "applied"),
        (encoded(Image.new("RGBA", (9, 9), (1, 2, 3, 254))), "untouched; reason=transparency"),
        (encoded(gradient("x", 0))[:-30], "untouched; reason=picture"),
        (b"\x89PNG\r\n\x1a\n" + b"junk" * 20, "untouched; reason=picture"),
        (b"GIF89a" + b"\x00" * 20, "untouched; reason=format"),
        (b"<svg/>", "untouched; reason=format"),
        (encoded(gradient("x", 0, (64, 65))), "untouched; reason=size"),
        (
            encoded(gradient("x", 0), "webp", save_all=True, append_images=[gradient("x", 1)]),
            "untouched; reason=animation",
        ),
    ],
    ids=["profile", "opaque", "grey", "transparent", "cut", "junk", "gif", "svg", "large", "animated"],
)
def test_what_a_flow_cannot_move_arrives_byte_for_byte(
    proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream, data: bytes, header: str
) -> None:
    upstream.answer = lambda asked: reply({"created": 1, "data": [{"b64_json": base64.b64encode(data).decode()}]})
    raw = client(proxy(pixels=64 * 64)).images.with_raw_response.generate(prompt="fox")
    assert raw.headers["x-flowalign"] == header
    (entry,) = raw.parse().data
    if header == "applied":
        before, after = decoded(data), decoded(b64(entry))
        assert (pixels(after) == 255 - pixels(before)).all()
        assert after.info.get("icc_profile") == before.info.get("icc_profile")
    else:
        assert b64(entry) == data


def test_an_upright_picture_stays_upright(
    proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream
) -> None:
    turned = Image.Exif()
    turned[274] = 6  # to be turned by a quarter before it is shown
    data = encoded(gradient("x", 0), exif=turned.tobytes())
    upstream.answer = lambda asked: reply({"created": 1, "data": [{"b64_json": base64.b64encode(data).decode()}]})
    after = decoded(b64(client(proxy()).images.generate(prompt="fox").data[0]))
    shown = ImageOps.exif_transpose(decoded(data))
    assert after.size == shown.size == (24, 32)
    assert (pixels(ImageOps.exif_transpose(after)) == 255 - pixels(shown)).all()


def test_a_flow_that_moves_nothing_leaves_the_bytes(
    proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream
) -> None:
    upstream.format, upstream.options = "jpeg", {"quality": 60}
    raw = client(proxy(lambda images, prompts: list(images))).images.with_raw_response.generate(prompt="fox")
    assert raw.headers["x-flowalign"] == "applied"
    assert b64(raw.parse().data[0]) == encoded(gradient("fox", 0), "jpeg", quality=60)


def test_a_mixed_answer_says_which_pictures_are_untouched(
    proxy: Callable[..., str], client: Callable[..., openai.OpenAI], upstream: Upstream
) -> None:
    good, bad = encoded(gradient("x", 0)), encoded(gradient("x", 1))[:-30]
    entries = [{"b64_json": base64.b64encode(data).decode()} for data in (bad, good, bad)] + [{"text": "?"}]
    upstream.answer = lambda asked: reply({"created": 1, "data": entries})
    raw = client(proxy()).images.with_raw_response.generate(prompt="fox", n=4)
    assert raw.headers["x-flowalign"] == "partial; untouched=0,2,3; reason=entry+picture"
    data = raw.parse().data
    assert [b64(data[0]), b64(data[2])] == [bad, bad]
    assert (pixels(decoded(b64(data[1]))) == 255 - pixels(gradient("x", 0))).all()


def test_pictures_of_several_requests_are_moved_together(proxy: Callable[..., str]) -> None:
    sizes = []

    def flow(images: Any, prompts: Any) -> list[Image.Image]:
        sizes.append(len(images))
        return inverted(images, prompts)

    url = proxy(flow, batch=4, batch_wait=0.3)

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            return await asyncio.gather(*(client.images.generate(prompt=f"p{i}", n=2) for i in range(4)))

    answers = asyncio.run(ask())
    assert sorted(sizes) == [4, 4]
    for i, answer in enumerate(answers):  # and nobody got another's
        for place, entry in enumerate(answer.data):
            assert (pixels(decoded(b64(entry))) == 255 - pixels(gradient(f"p{i}", place))).all()
