"""Which addresses pictures may be fetched from: a list of names, and only where these lead to the public internet."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore

from flowalign.errors import ConfigError

PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class NotAllowed(Exception):
    """An address that is not fetched; `str()` of it says why, without the address."""


@dataclass(frozen=True)
class Origin:
    scheme: str
    host: str
    port: int


def origin(url: str) -> Origin:
    """Raises NotAllowed for what has no http or https origin, or carries a name and password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise NotAllowed("it cannot be read") from None
    if parts.scheme not in PORTS:
        raise NotAllowed("its scheme is neither https nor http")
    if "@" in parts.netloc:
        raise NotAllowed("it carries a name or password")
    if not parts.hostname or any(ord(letter) <= 32 or letter == "\\" for letter in url):
        raise NotAllowed("it cannot be read")
    try:
        host = parts.hostname.encode("idna").decode("ascii").rstrip(".").lower()
    except UnicodeError:
        raise NotAllowed("its host cannot be read") from None
    return Origin(parts.scheme, host, PORTS[parts.scheme] if port is None else port)


class Allowed:
    """The upstream's own origin, and further hosts by https on its usual port, where they lead to public addresses."""

    def __init__(self, upstream: str, hosts: Iterable[str] = ()) -> None:
        """Raises ConfigError for an upstream or host that cannot be one."""
        try:
            self.own = origin(upstream)
            if "?" in upstream or "#" in upstream:
                raise NotAllowed("it carries a query")
        except NotAllowed as error:
            raise ConfigError(
                f"--upstream {redacted(upstream)} cannot be used: {error}; give http(s)://HOST[:PORT]/v1."
            ) from None
        self.hosts = frozenset(_named(host) for host in hosts)

    def check(self, url: str) -> Origin:
        """The origin of an address that may be fetched. Raises NotAllowed."""
        found = origin(url)
        if found == self.own:
            return found
        if found.scheme != "https":
            raise NotAllowed("only the upstream itself is asked without https")
        if found.host not in self.hosts:
            raise NotAllowed("its host is not on the list")
        if found.port != PORTS["https"]:
            raise NotAllowed("its port is not 443")
        return found


def _named(host: str) -> str:
    try:
        found = origin(f"https://{host}")
    except NotAllowed as error:
        raise ConfigError(f"--url-host {host} is not a host: {error}; give a name such as pictures.example.org.") from None
    if found.port != PORTS["https"] or host.lower().rstrip(".") not in (found.host, found.host.encode().decode("idna")):
        raise ConfigError(f"--url-host {host} is not the name of a host alone; give a name such as {found.host}.")
    return found.host


def redacted(url: str) -> str:
    """An address without what may be secret in it: scheme, host and port only."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        return "(an address that cannot be read)"


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, seen through all ways to write IPv4 inside IPv6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if found.sixtofour is not None or found.teredo is not None or found in NAT64 or found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Resolves a name once, checks every address it has, and connects to one that was checked.

    Between the check and the connection there is no second look-up that could answer otherwise.
    """

    def __init__(self, own: Origin) -> None:
        self._own = own
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from error
        except OSError as error:
            raise httpcore.ConnectError("the name cannot be resolved") from error
        addresses = [str(entry[4][0]) for entry in found]
        trusted = (host, port) == (self._own.host, self._own.port)  # whoever started the server named this one
        if not trusted and not all(is_public(address) for address in addresses):
            raise NotAllowed("its host leads into a private network")
        return await self._network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise NotAllowed("it is a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
