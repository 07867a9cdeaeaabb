"""The ASGI app: routes, and how the parts of a server are put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from flowalign import __version__
from flowalign.serve.access import PICTURES, Access
from flowalign.serve.addresses import Allowed
from flowalign.serve.backend import Backend, Links
from flowalign.serve.batching import Worker
from flowalign.serve.fetch import Fetcher
from flowalign.serve.formats import MEDIA
from flowalign.serve.front import GONE, Front
from flowalign.serve.generation import read_json, while_connected
from flowalign.serve.generator import Draw, Embedded
from flowalign.serve.improver import Improve, Improver
from flowalign.serve.limits import Gate, Limits
from flowalign.serve.metrics import CONTENT_TYPE, Metrics
from flowalign.serve.openapi import document, page
from flowalign.serve.problems import ClientGone, Problem
from flowalign.serve.proxy import Proxy
from flowalign.serve.store import PictureStore
from flowalign.serve.upstream import Upstream

if TYPE_CHECKING:
    from flowalign.scoring.rewards.base import Reward
    from flowalign.serve.scores import Scorer


@dataclass(frozen=True)
class Generating:
    """Serve a generator of our own."""

    draw: Draw
    names: tuple[str, ...]
    """What its model is called."""


@dataclass(frozen=True)
class Proxying:
    """Stand in front of another images API."""

    url: str
    """Up to and with /v1."""
    url_hosts: tuple[str, ...] = ()
    """Hosts that pictures may be fetched from, beside the upstream's own."""
    key: str | None = field(default=None, repr=False)
    """The upstream's key, in place of the callers'."""


@dataclass(frozen=True)
class Service:
    """A server that only needs a socket."""

    app: ASGIApp
    metrics: Metrics
    limits: Limits


def make_service(
    source: Generating | Proxying | None,
    *,
    improve: Improve | None = None,
    rewards: Sequence[Reward] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    access: Access = Access(),  # noqa: B008
    public_url: str | None = None,
) -> Service:
    """Put a server together. improve: what moves pictures; rewards: what /v1/score offers.

    Raises ConfigError for an upstream that cannot be one.
    """
    metrics, worker = Metrics(), Worker()
    store = PictureStore(size=limits.stored, count=limits.stored_count, seconds=limits.stored_seconds)
    links = Links(PICTURES, public_url)
    backend: Backend | None = None
    improver: Improver | None = None
    if isinstance(source, Proxying):
        allowed = Allowed(source.url, source.url_hosts)
        if improve is not None:
            improver = Improver(improve, worker, limits, metrics, store, Fetcher(allowed, limits))
        backend = Proxy(Upstream(source.url, limits, metrics, source.key), improver, limits, metrics, links)
    elif isinstance(source, Generating):
        if improve is not None:
            improver = Improver(improve, worker, limits, metrics, store, None)
        backend = Embedded(source.draw, source.names, worker, improver, limits, metrics, store, links)
    scorer = None
    if rewards:
        from flowalign.serve.scores import Scorer

        scorer = Scorer(rewards, worker, limits, metrics)
    gate = Gate(limits)
    for name, text, read in _gauges(gate, store, improver):
        metrics.gauge(name, text, read)
    handlers = Handlers(backend, scorer, gate, limits, metrics, store)
    return Service(Front(handlers.app(), access, metrics), metrics, limits)


def _gauges(gate: Gate, store: PictureStore, improver: Improver | None) -> list[tuple[str, str, Callable[[], float]]]:
    found: list[tuple[str, str, Callable[[], float]]] = [
        ("working_requests", "Requests that are worked on.", lambda: gate.working),
        ("waiting_requests", "Requests that wait for a place.", lambda: gate.waiting),
        ("stored_pictures", "Pictures kept to be fetched.", lambda: len(store)),
        ("stored_bytes", "Bytes of them.", lambda: store.size),
    ]
    if improver is not None:
        found.append(("flow_waiting_pictures", "Pictures that wait for the flow.", lambda: improver.batcher.waiting))
        found.append(("flow_picture_seconds", "Estimated seconds of the flow for a picture.", lambda: improver.batcher.seconds))
    return found


class Handlers:
    """One function a route."""

    def __init__(
        self,
        backend: Backend | None,
        scorer: Scorer | None,
        gate: Gate,
        limits: Limits,
        metrics: Metrics,
        store: PictureStore,
    ) -> None:
        self.backend, self.scorer, self.gate, self.limits = backend, scorer, gate, limits
        self.metrics, self.store = metrics, store
        self.ready = False
        role = None if backend is None else backend.role
        self.described = document(__version__, limits, role=role, scores=scorer is not None)

    def app(self) -> Starlette:
        routes = [
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.measured),
            Route("/openapi.json", self.openapi),
            Route("/docs", self.docs),
        ]
        if self.backend is not None:
            routes += self._image_routes(self.backend)
        if self.scorer is not None:
            routes.append(self._score_route(self.scorer))
        handlers: dict[Any, Any] = {Problem: _problem, HTTPException: _http, ClientGone: _gone}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    def _image_routes(self, backend: Backend) -> list[Route]:
        async def generations(request: Request) -> Response:
            body = await read_json(request, self.limits.body, self.limits.body_timeout)
            return await while_connected(request.receive, self._in_turn(lambda: backend.generate(request, body)))

        async def models(request: Request) -> Response:
            work = backend.models(request, request.path_params.get("model"))
            return await while_connected(request.receive, work)

        return [
            Route("/v1/images/generations", generations, methods=["POST"]),
            Route(f"{PICTURES}{{token}}", self.content),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", models),
        ]

    def _score_route(self, scorer: Scorer) -> Route:
        async def score(request: Request) -> Response:
            body = await read_json(request, self.limits.score_body, self.limits.body_timeout)
            return await while_connected(request.receive, self._in_turn(lambda: scorer.score(body)))

        return Route("/v1/score", score, methods=["POST"])

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
        async with self.gate.place():
            return await work()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.ready = True
        try:
            yield
        finally:
            self.ready = False
            if self.backend is not None:
                await self.backend.close()

    async def content(self, request: Request) -> Response:
        kept = self.store.get(request.path_params["token"])
        if kept is None:
            raise Problem(404, "There is no such picture, or no longer.", code="picture_not_found")
        return Response(kept.data, media_type=MEDIA[kept.format], headers={"cache-control": "private, no-store"})

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        return JSONResponse({"status": "ready"}) if self.ready else JSONResponse({"status": "starting or ending"}, 503)

    async def measured(self, request: Request) -> Response:
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.described)

    async def docs(self, request: Request) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
        return HTMLResponse(page(self.described), headers={"content-security-policy": policy})


def _problem(request: Request, problem: Problem) -> Response:
    return problem.answer()


def _http(request: Request, error: HTTPException) -> Response:
    """A path or method that is not there."""
    text = (
        f"{request.method} {request.url.path[:200]} is not here; see /docs."
        if error.status_code in (404, 405)
        else error.detail
    )
    return Problem(error.status_code, text, code="not_found", headers=dict(error.headers or {})).answer()


def _gone(request: Request, error: ClientGone) -> Response:
    return Response(status_code=GONE)
