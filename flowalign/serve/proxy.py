"""An images API in front of another: same requests, same answers, pictures after a flow."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from flowalign.serve.backend import Backend, Links
from flowalign.serve.generation import check_common
from flowalign.serve.improver import HEADER, Improver, Outcome, untouched
from flowalign.serve.limits import Limits
from flowalign.serve.metrics import Metrics
from flowalign.serve.upstream import Answer, Upstream, passed_on, pictures_of

LARGE = 1 << 20
"""Bytes from which JSON is read and written beside the event loop."""
log = logging.getLogger("flowalign.serve")


class Proxy(Backend):
    """A picture that the upstream drew always arrives: moved, or as it came with a header that says why."""

    role = "proxy"

    def __init__(self, upstream: Upstream, improver: Improver | None, limits: Limits, metrics: Metrics, links: Links) -> None:
        self.upstream, self.improver, self.limits, self.metrics, self.links = upstream, improver, limits, metrics, links

    async def generate(self, request: Request, body: dict[str, Any]) -> Response:
        check_common(body, self.limits)
        answer = await self.upstream.ask(
            "POST",
            "/images/generations",
            request.headers,
            query=request.url.query,
            content=json.dumps(body).encode(),  # not the caller's bytes: what was checked is what is sent
        )
        if not answer.ok:
            return _refusal(answer)
        found = await asyncio.to_thread(answer.json) if len(answer.body) > LARGE else answer.json()
        entries = pictures_of(answer, found)
        started = time.perf_counter()
        content, outcome = await self._moved(answer, found, entries, body["prompt"], request)
        outcome.note(self.metrics)
        if self.improver is not None:
            self.metrics.flow_seconds.observe(time.perf_counter() - started)
        return Response(content, 200, answer.headers | {HEADER: outcome.header()}, "application/json")

    async def _moved(
        self, answer: Answer, found: dict[str, Any], entries: list[dict[str, Any]], prompt: str, request: Request
    ) -> tuple[bytes, Outcome]:
        if self.improver is None:
            return answer.body, untouched(len(entries), "no-flow")
        try:
            moved, outcome = await self.improver.entries(entries, prompt, lambda token: self.links.address(request, token))
            if len(outcome.untouched) == len(entries):
                return answer.body, outcome
            after = found | {"data": moved}
            content = await asyncio.to_thread(json.dumps, after) if len(answer.body) > LARGE else json.dumps(after)
            return content.encode(), outcome
        except Exception:  # whatever goes wrong here, the upstream's answer is there and is passed on
            log.exception("moving pictures failed")
            return answer.body, untouched(len(entries), "internal")

    async def models(self, request: Request, model: str | None) -> Response:
        path = "/models" if model is None else f"/models/{quote(model, safe='')}"
        answer = await self.upstream.ask("GET", path, request.headers, query=request.url.query)
        return Response(answer.body, 200, answer.headers, "application/json") if answer.ok else _refusal(answer)

    async def close(self) -> None:
        if self.improver is not None:
            self.improver.close()
            if self.improver.fetcher is not None:
                await self.improver.fetcher.close()
        await self.upstream.close()


def _refusal(answer: Answer) -> Response:
    """An upstream's own error, unchanged where clients can read it."""
    problem = passed_on(answer)
    if problem is not None:
        return problem.answer()
    return Response(answer.body, answer.status, answer.headers, "application/json")
