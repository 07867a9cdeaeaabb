"""Pictures that an upstream answers as an address: fetched only from where they may come from, and never elsewhere."""

from __future__ import annotations

import asyncio
import ssl

import httpcore

from flowalign.serve.addresses import Allowed, CheckedNetwork, NotAllowed
from flowalign.serve.limits import Limits


class FetchError(Exception):
    """A picture that could not be fetched; `str()` of it says why, without the address."""


class Fetcher:
    """Asks once, follows nothing, sends no key and no cookie, and reads no proxy from the environment."""

    def __init__(self, allowed: Allowed, limits: Limits) -> None:
        self.allowed, self.limits = allowed, limits
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=limits.concurrency * 2,
            max_keepalive_connections=8,
            keepalive_expiry=2.0,
            network_backend=CheckedNetwork(self.allowed.own),
        )

    async def get(self, url: str) -> bytes:
        """The bytes at an address. Raises NotAllowed and FetchError."""
        self.allowed.check(url)
        try:
            async with asyncio.timeout(self.limits.fetch_timeout):
                return await self._get(url)
        except TimeoutError:
            raise FetchError(f"it took more than {self.limits.fetch_timeout:g} s") from None
        except (NotAllowed, FetchError):
            raise
        except Exception as error:  # httpcore's own, and those of h11, ssl and the network below
            raise FetchError(type(error).__name__) from None

    async def _get(self, url: str) -> bytes:
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("accept", "image/png, image/jpeg, image/webp"),
            ("accept-encoding", "identity"),
            ("user-agent", "flowalign"),
        ]
        timeout = {"connect": self.limits.connect_timeout, "pool": self.limits.fetch_timeout}
        async with self._pool.stream("GET", url, headers=headers, extensions={"timeout": timeout}) as response:
            if response.status != 200:  # a redirect among them
                raise FetchError(f"status {response.status}")
            data = bytearray()
            async for chunk in response.aiter_stream():
                data += chunk
                if len(data) > self.limits.picture:
                    raise FetchError(f"more than {self.limits.picture} bytes")
        return bytes(data)

    async def close(self) -> None:
        await self._pool.aclose()
