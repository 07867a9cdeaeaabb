"""The images API behind a proxy: asked with the caller's key, read within limits, and believed only when it makes sense."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from flowalign.serve.limits import Limits
from flowalign.serve.metrics import Metrics
from flowalign.serve.problems import Problem, refused, upstream_problem

ASKED_WITH = (
    "authorization",
    "api-key",
    "idempotency-key",
    "openai-beta",
    "openai-organization",
    "openai-project",
    "user-agent",
    "x-client-request-id",
)
"""Headers of a caller that the upstream sees; no other one does."""
ANSWERED_WITH = ("retry-after", "retry-after-ms", "x-request-id", "x-should-retry", "x-ratelimit-", "openai-")
"""Headers of the upstream that a caller sees, by how they begin."""


@dataclass(frozen=True)
class Answer:
    """A whole answer of an upstream."""

    status: int
    headers: dict[str, str]
    """Those that a caller sees."""
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Upstream:
    """Raises Problem in OpenAI's shape for everything but an answer: 502 where there is none, 504 where it takes too long."""

    def __init__(self, url: str, limits: Limits, metrics: Metrics, key: str | None = None) -> None:
        """url: up to and with /v1. key: the upstream's, in place of the callers'."""
        self.url = url.rstrip("/")
        self.limits, self.metrics = limits, metrics
        self._key = key
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,  # no proxies, and no passwords out of ~/.netrc
            timeout=httpx.Timeout(None, connect=limits.connect_timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=limits.concurrency, keepalive_expiry=2.0),
        )

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], *, query: str = "", content: bytes | None = None
    ) -> Answer:
        """Ask once. A request is never repeated here: the first may have been paid for."""
        sent = {name.encode(): headers[name].encode("latin-1") for name in ASKED_WITH if name in headers}  # as it came
        sent |= {b"accept": b"application/json", b"accept-encoding": b"identity"}
        if self._key is not None:
            sent.pop(b"api-key", None)
            sent[b"authorization"] = f"Bearer {self._key}".encode()
        if content is not None:
            sent[b"content-type"] = b"application/json"
        url = f"{self.url}{path}{'?' + query if query else ''}"
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.limits.upstream_timeout):
                answer = await self._ask(method, url, sent, content)
        except Problem as problem:
            self.metrics.upstream_failures.add(problem.code or "")
            raise
        except TimeoutError:
            raise self._failed(504, f"did not answer in {self.limits.upstream_timeout:g} s", "upstream_timeout") from None
        except httpx.ConnectTimeout:
            limit = self.limits.connect_timeout
            raise self._failed(504, f"could not be reached in {limit:g} s", "upstream_timeout", again=True) from None
        except (httpx.ConnectError, httpx.PoolTimeout):
            raise self._failed(502, "cannot be reached", "upstream_unreachable", again=True) from None
        except httpx.InvalidURL:
            raise refused("The query cannot be passed on.") from None
        except httpx.HTTPError:  # the connection broke, or what came is not HTTP
            raise self._failed(502, "broke off its answer", "upstream_broken") from None
        self.metrics.upstream_seconds.observe(time.perf_counter() - started)
        if not answer.ok:
            self.metrics.upstream_failures.add(str(answer.status))
        return answer

    async def _ask(self, method: str, url: str, headers: dict[bytes, bytes], content: bytes | None) -> Answer:
        async with self._client.stream(method, url, headers=headers, content=content) as response:
            status = response.status_code
            if not (200 <= status < 300 or 400 <= status < 600):
                raise _problem(502, f"answered with status {status}", "upstream_invalid")
            told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers.raw}
            shown = {name: value for name, value in told.items() if name.startswith(ANSWERED_WITH)}
            return Answer(status, shown, await self._body(response))

    async def _body(self, response: httpx.Response) -> bytes:
        limit, length = self.limits.answer, response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _problem(502, f"answered with more than {limit} bytes", "upstream_too_large")
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise _problem(502, f"answered with the encoding {encoding[:40]!r}, which was not asked for", "upstream_invalid")
        inflate = None if encoding in ("identity", "") else zlib.decompressobj(zlib.MAX_WBITS | 32)
        data = bytearray()
        async for chunk in response.aiter_raw():
            try:
                data += chunk if inflate is None else inflate.decompress(chunk, limit + 1 - len(data))
            except zlib.error:
                raise _problem(502, "broke off its answer", "upstream_broken") from None
            if len(data) > limit:
                raise _problem(502, f"answered with more than {limit} bytes", "upstream_too_large")
        if inflate is not None and not inflate.eof:
            raise _problem(502, "broke off its answer", "upstream_broken")
        return bytes(data)

    def _failed(self, status: int, what: str, code: str, *, again: bool = False) -> Problem:
        self.metrics.upstream_failures.add(code)
        return _problem(status, what, code, again=again)

    async def close(self) -> None:
        await self._client.aclose()


def _problem(status: int, what: str, code: str, *, again: bool = False) -> Problem:
    return upstream_problem(status, f"The upstream {what}.", code, again=again)


def pictures_of(answer: Answer, found: Any) -> list[dict[str, Any]]:
    """The entries of an answer with pictures. Raises Problem (502) for anything else, whatever its content type says.

    The content type alone decides nothing: pictures under a wrong one have been paid for all the same.
    """
    entries = found.get("data") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise _problem(502, "answered with something else than pictures", "upstream_invalid")
    return entries


def passed_on(answer: Answer) -> Problem | None:
    """An error of the upstream that is not in OpenAI's shape, put into it; None for one that is."""
    found = answer.json()
    if isinstance(found, dict) and "error" in found:
        return None
    return Problem(
        answer.status,
        f"The upstream answered with status {answer.status}.",
        code="upstream_error",
        kind="upstream_error" if answer.status >= 500 else None,
        headers=answer.headers,
    )
