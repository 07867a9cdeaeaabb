"""What answers the image routes: an upstream behind a proxy, or a generator of our own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from flowalign.serve.limits import Limits


class Backend(ABC):
    """Raises Problem wherever a request cannot be answered."""

    role: str
    """proxy or generator."""
    limits: Limits

    @abstractmethod
    async def generate(self, request: Request, body: dict[str, Any]) -> Response:
        """The answer to a request for pictures, whose body was read."""

    @abstractmethod
    async def models(self, request: Request, model: str | None) -> Response:
        """All models, or one."""

    @abstractmethod
    async def close(self) -> None:
        """Give up connections and threads."""


class Links:
    """Addresses of kept pictures, as callers reach them."""

    def __init__(self, path: str, public_url: str | None = None) -> None:
        self._path, self._public = path, public_url.rstrip("/") if public_url else None

    def address(self, request: Request, token: str) -> str:
        base = self._public or str(request.base_url).rstrip("/")
        return f"{base}{self._path}{token}"
