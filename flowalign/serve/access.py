"""Who may ask: the server's own key, the names it answers to, and the addresses it may listen on."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from flowalign.errors import ConfigError
from flowalign.serve.problems import Problem

KEY_HEADER = "x-flowalign-key"
OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")
"""What is answered without a key: nothing of a caller's is in it."""
PICTURES = "/v1/images/content/"
"""Kept pictures: their address is itself the key, as with other image APIs."""


@dataclass(frozen=True)
class Access:
    """What a request must show before anything else is looked at."""

    key: str | None = field(default=None, repr=False)
    """The server's own key; None: none is asked for."""
    bearer: bool = True
    """Whether the key may come as `Authorization: Bearer`. Not so where that header belongs to the upstream."""
    hosts: frozenset[str] | None = None
    """Names that the Host header may carry; None: any. Keeps web pages whose name was pointed at this address away."""

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises Problem: 403 for another Host, 401 for a key that is missing or wrong."""
        if self.hosts is not None and host_name(headers.get("host", "")) not in self.hosts:
            raise Problem(403, "This server does not answer to that Host; start it with --public-url.", code="host_not_allowed")
        if self.key is None or path in OPEN or path.startswith(PICTURES):
            return
        given = headers.get(KEY_HEADER)
        if given is None and self.bearer:
            scheme, _, credentials = headers.get("authorization", "").partition(" ")
            given = credentials.strip() if scheme.lower() == "bearer" else None
        if given is None or not hmac.compare_digest(_digest(given), _digest(self.key)):
            place = f"{KEY_HEADER} or Authorization: Bearer" if self.bearer else KEY_HEADER
            what = "needs a key" if given is None else "does not know this key"
            raise Problem(
                401,
                f"This server {what}; send its key as {place}.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _digest(text: str) -> bytes:
    """Of one length whatever the text's, so that comparing tells nothing about it."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def host_name(host: str) -> str:
    """`Example.org:80` -> `example.org`; `[::1]:80` -> `::1`; "" for what is no host."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, key: str | None, *, allow_public: bool) -> None:
    """Raises ConfigError for an address that others can reach, unless a key is set or it was allowed on purpose."""
    if key is None and not allow_public and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached by others and no key is asked for; set FLOWALIGN_API_KEY, or add --allow-public to "
            "serve everybody."
        )


def own_hosts(host: str, public_url: str | None, *, allow_public: bool) -> frozenset[str] | None:
    """Names a server answers to: on this machine only its own, so that no web page reaches it under another; else any."""
    if not is_loopback(host) or allow_public:
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", host, host_name(urlsplit(public_url or "").netloc)} - {""})
