"""What a server answers instead of pictures: errors in the shape that clients of OpenAI's API know."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse


class Problem(Exception):
    """An answer other than the one asked for. `kind` and `code` are OpenAI's `type` and `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def answer(self) -> JSONResponse:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


class ClientGone(Exception):
    """The caller hung up: nobody reads an answer."""


def refused(message: str, *, param: str | None = None, code: str | None = None) -> Problem:
    """A request that cannot be answered as it is: 400."""
    return Problem(400, message, param=param, code=code)


def upstream_problem(status: int, message: str, code: str, *, again: bool) -> Problem:
    """An upstream that gave no pictures. `again`: it surely has not drawn any, so that asking again costs nothing twice.

    OpenAI's clients repeat a request that failed unless they are told not to.
    """
    return Problem(status, message, code=code, kind="upstream_error", headers={} if again else {"x-should-retry": "false"})
