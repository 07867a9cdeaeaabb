"""The outermost layer: who may ask, what is measured and logged of every request, and no answer without a shape."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowalign.serve.access import PICTURES, Access
from flowalign.serve.metrics import Metrics
from flowalign.serve.problems import Problem

ROUTES = ("/v1/images/generations", "/v1/models", "/v1/score", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs")
ROUTES += ("/", "/picture")
GONE = 499
"""Logged and counted where a caller hung up before there was an answer."""
log = logging.getLogger("flowalign.serve")


def route(path: str) -> str:
    """A path as it is logged and counted: without what a caller chose, such as the token of a picture."""
    if path in ROUTES:
        return path
    for prefix, shown in ((PICTURES, f"{PICTURES}TOKEN"), ("/v1/models/", "/v1/models/MODEL")):
        if path.startswith(prefix):
            return shown
    return "other"


class Front:
    """ASGI around the app. Headers, bodies, queries and tokens never reach the log."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self.app, self.access, self.metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, identifier = time.perf_counter(), 0, secrets.token_hex(8)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-request-id", identifier)
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            self.access.check(scope["path"], Headers(scope=scope))
            await self.app(scope, receive, answer)
        except Problem as problem:
            await problem.answer()(scope, receive, answer)
        except Exception as error:
            log.error("unexpected: %s", type(error).__name__, exc_info=error)
            if not status:
                await Problem(500, "Something unexpected failed; it is in the server's log.").answer()(scope, receive, answer)
        finally:
            self._note(scope, status or GONE, time.perf_counter() - started, identifier)

    def _note(self, scope: Scope, status: int, seconds: float, identifier: str) -> None:
        shown = route(scope["path"])
        self.metrics.requests.add(shown, str(status))
        self.metrics.request_seconds.observe(seconds, shown)
        level = logging.DEBUG if shown in ("/healthz", "/readyz", "/metrics") else logging.INFO
        log.log(level, "%s %s %d %.0f ms %s", scope["method"], shown, status, 1000 * seconds, identifier)
