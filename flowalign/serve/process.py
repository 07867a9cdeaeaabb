"""A server as a process: its socket, its log, and its end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from flowalign.errors import ConfigError
from flowalign.serve.app import Service
from flowalign.serve.connections import patient

log = logging.getLogger("flowalign.serve")
LOGGERS = ("flowalign.serve", "uvicorn.error")
TALKATIVE = ("httpx", "httpcore", "uvicorn.access", "asyncio")
"""They would log addresses, or at their lowest level even headers: keys among them."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError."""
    if port > 65535:  # looking it up would take it modulo 65536
        raise ConfigError(f"--port is {port}; it must be from 0 to 65535.")
    listening = None
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio switches Nagle's algorithm off only for sockets that say they are TCP: otherwise a small answer, written as
        # headers and body, waits 40 ms for the caller's delayed acknowledgement.
        listening = socket.socket(family, kind, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        said = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{host} port {port} cannot be listened on ({said}); choose another --port or --host.") from error
    return listening


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(service: Service) -> uvicorn.Server:
    """uvicorn around a service; `run(sockets=[...])` serves until a signal, then lets requests in work finish."""
    limits = service.limits
    config = uvicorn.Config(
        service.app,
        http=patient(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=max(1, round(limits.drain_timeout)),
    )
    return uvicorn.Server(config)


def serve(service: Service, listening: socket.socket, *, level: str = "info") -> int:
    """Serve until SIGINT or SIGTERM, then finish what is in work; the number of requests answered."""
    server = make_server(service)
    with listening, _logging(level), _signals(server):
        server.run(sockets=[listening])
    return int(sum(service.metrics.requests.values.values()))


@contextmanager
def _logging(level: str) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)


@contextmanager
def _signals(server: uvicorn.Server) -> Iterator[None]:
    """A signal before uvicorn listens for it ends the server too; the one that uvicorn raises again has done its work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        server.should_exit = True

    before = {each: signal.signal(each, leave) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
