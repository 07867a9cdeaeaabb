"""A page with a slider for each objective of a steered run, and the pictures that its model draws under what they say: weights,
or scores to draw for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from flowalign.errors import UserError
from flowalign.serve.access import Access
from flowalign.serve.app import Service
from flowalign.serve.batching import Batcher, Full, Late, Worker
from flowalign.serve.formats import MEDIA, encode
from flowalign.serve.front import Front
from flowalign.serve.limits import Limits
from flowalign.serve.metrics import Metrics
from flowalign.serve.problems import Problem, refused

SHOWN = 4
"""Pictures under the weights, and as many without, from seeds in a row."""
LONGEST = 2_000
"""Characters of a prompt."""
Weights = Mapping[str, float]
Draw = Callable[[Sequence[str], Sequence[int], Sequence[Weights | None]], list[Image.Image]]
"""Prompts, seeds and weights, None for none -> one picture each. Raises UserError for what it cannot draw."""
Wanted = tuple[str, int, Weights | None]


@dataclass(frozen=True)
class Explored:
    """What the page is about."""

    title: str
    objectives: tuple[str, ...]
    prompt: str
    """That it begins with."""
    told: str = "weights"
    """weights, which the page brings to a sum of 1, or scores, each from 0 to 1 for itself."""


def make_explorer(about: Explored, draw: Draw, access: Access, limits: Limits = Limits()) -> Service:  # noqa: B008 - frozen
    """The page at `/`, and `/picture?prompt=…&seed=…&w=…&w=…`, a weight for each objective in their order, or none, as PNG."""
    metrics = Metrics()
    handlers = Explorer(about, draw, limits)
    routes = [Route("/", handlers.page), Route("/picture", handlers.picture)]
    app = Starlette(routes=routes, exception_handlers={Problem: _problem, HTTPException: _http})  # type: ignore[dict-item]
    return Service(Front(app, access, metrics), metrics, limits)


class Explorer:
    """One function a route."""

    def __init__(self, about: Explored, draw: Draw, limits: Limits) -> None:
        self.about, self.limits = about, limits
        self.html, self.policy = document(about)
        self.batcher: Batcher[Wanted, Image.Image] = Batcher(
            lambda items: draw(*(list(each) for each in zip(*items, strict=True))),  # type: ignore[arg-type]
            Worker(),
            size=limits.batch,
            wait=limits.batch_wait,
            capacity=limits.batch_queue,
        )

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self.html, headers={"content-security-policy": self.policy})

    async def picture(self, request: Request) -> Response:
        item = self._wanted(request)
        loop = asyncio.get_running_loop()
        try:
            image = await self.batcher.submit(item, loop.time() + self.limits.generate_timeout)
        except (Late, Full):
            raise Problem(503, "There is more to draw than can be done in time; wait a moment.", code="server_busy") from None
        except UserError as error:
            raise refused(str(error)) from None
        data = await loop.run_in_executor(None, encode, image, "png", {})
        return Response(data, media_type=MEDIA["png"], headers={"cache-control": "private, max-age=600"})

    def _wanted(self, request: Request) -> Wanted:
        """Raises Problem."""
        asked, objectives = request.query_params, self.about.objectives
        prompt, seed = asked.get("prompt", ""), asked.get("seed", "")
        if not prompt.strip() or len(prompt) > LONGEST:
            raise refused(f"prompt must be a text of 1 to {LONGEST} characters.", param="prompt")
        if not seed.isdecimal() or len(seed) > 18:
            raise refused("seed must be a whole number of 0 or more, of 18 digits at most.", param="seed")
        try:
            weights = [float(each) for each in asked.getlist("w")]
        except ValueError:
            raise refused("w must be a number.", param="w") from None
        if weights and len(weights) != len(objectives):
            raise refused(f"w must be there once for each of {', '.join(objectives)}, or not at all.", param="w")
        return prompt, int(seed), dict(zip(objectives, weights, strict=True)) if weights else None


def document(about: Explored) -> tuple[str, str]:
    """(the page, its content security policy): it loads nothing but pictures from where it came."""
    here = files("flowalign.serve")
    style, script = (here.joinpath(f"explore.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sliders = "".join(
        f'<label class="slider"><span>{escape(name)}</span><output for="w{place}"></output>'
        f'<input type="range" id="w{place}" min="0" max="100" value="50"></label>'
        for place, name in enumerate(about.objectives)
    )
    under = "For these scores" if about.told == "scores" else "Under these weights"
    rows = "".join(
        f'<section><h2>{title}</h2><div class="pictures">'
        + "".join(f'<img data-side="{side}" data-offset="{place}" alt="">' for place in range(SHOWN))
        + "</div></section>"
        for side, title in (("steered", under), ("plain", f"Without {about.told}"))
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src 'sha256-{digest}'"
    )
    html = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(about.title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n<h1>{escape(about.title)}</h1>\n"
        f'<form id="controls" data-told="{about.told}"><label class="prompt"><span>Prompt</span>'
        f'<input id="prompt" maxlength="{LONGEST}" value="{escape(about.prompt)}"></label>'
        '<label><span>Seed</span><input id="seed" type="number" min="0" step="1" value="0"></label>'
        f'<button type="button" id="next">Next seeds</button><div class="sliders">{sliders}</div></form>\n'
        f'{rows}\n<p id="says" role="status"></p>\n</main>\n<script>{script}</script>\n</body>\n</html>\n'
    )
    return html, policy


def _problem(request: Request, problem: Problem) -> Response:
    return problem.answer()


def _http(request: Request, error: HTTPException) -> Response:
    return Problem(error.status_code, f"{request.method} {request.url.path[:200]} is not here; open /.").answer()
