"""Connections that do not wait for ever: for headers that never end, or for a caller who does not read."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from flowalign.serve.limits import Limits


def patient(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with an end to patience: `header_timeout` for a request's headers, `send_timeout` without progress
    of an answer. (Bodies have their own limit, and connections between requests uvicorn's.)
    """
    look = min(5.0, limits.header_timeout / 4, limits.send_timeout / 4)

    class Patient(H11Protocol):
        _heard: float | None
        _unsent: int
        _unsent_since: float
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._heard, self._unsent, self._unsent_since = self.loop.time(), 0, self.loop.time()
            self._timer = self.loop.call_later(look, self._look)

        def data_received(self, data: bytes) -> None:
            if self._heard is None and not self._working():
                self._heard = self.loop.time()  # the next request begins
            super().data_received(data)
            if self._working():
                self._heard = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _working(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _look(self) -> None:
            now = self.loop.time()
            unsent = self.transport.get_write_buffer_size()
            if unsent == 0 or unsent != self._unsent:
                self._unsent, self._unsent_since = unsent, now
            if unsent and now - self._unsent_since > limits.send_timeout:
                self.transport.abort()  # `close` would first wait for what nobody reads
            elif self._heard is not None and now - self._heard > limits.header_timeout:
                self.transport.close()
            self._timer = self.loop.call_later(look, self._look)

    return Patient
