"""An OpenAI-style images API as a generator: prompts and seeds in, pictures out."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

from flowalign.data.images import decode
from flowalign.errors import ConfigError, DataError, MissingExtraError, RunError, reason

if TYPE_CHECKING:
    import httpx

LARGEST = 64 * 2**20
"""Bytes of an answer that are read at most."""
PATIENCE = 60.0
"""Seconds that are waited at most before one more try."""
CONNECT = 30.0
"""Seconds that a connection may take."""
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed later."""
UNDRAWN = (425, 429)
"""Those of them that say that the request was not looked at; 503 does where it says when to come again."""


@dataclass(frozen=True)
class ImagesAPI:
    """`POST {url}/images/generations`, one picture a request; answers in base64 or by address.

    A picture may have its price, so it is asked for again only where none was drawn for sure: after 425 and 429, after 503 with
    a Retry-After, and where no connection came about; never against `x-should-retry: false`. Fetching one from its address is
    repeated after whatever may pass.

    Raises ConfigError for what is no address or no key, RunError where no picture comes.
    """

    url: str
    """Such as https://api.openai.com/v1."""
    model: str
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token, to `url` only."""
    size: str | None = None
    """Such as 1024x1024; None leaves it to the API."""
    response_format: str | None = None
    """b64_json or url, for models that have a choice."""
    seed_field: str | None = None
    """Name under which the seed is sent; None sends none, because most such APIs take none."""
    hosts: tuple[str, ...] = ()
    """From which pictures are fetched besides that of `url`, where an answer holds their address."""
    timeout: float = 720.0
    """Seconds without a byte after which a request has failed; more than `flowalign serve` takes for one by its own limits."""
    retries: int = 3
    """Tries after the first, where they cost nothing twice."""
    parallel: int = 4
    """Requests under way at a time."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not the address of an API; write one such as https://api.openai.com/v1.")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key == self.key.strip()):
            # httpx would refuse it too, and say it.
            raise ConfigError("the key of the API cannot be sent: it has spaces around it or is not plain text; set it anew.")

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One picture for each prompt and seed, in order."""
        drawn = dict[int, Image.Image]()
        self.each(prompts, seeds, drawn.__setitem__)
        return [drawn[place] for place in range(len(prompts))]

    def each(self, prompts: Sequence[str], seeds: Sequence[int], keep: Callable[[int, Image.Image], None]) -> None:
        """The same; every picture is given to `keep`, with its place, as soon as it is there, in the thread that asked for it.

        So it is kept whatever becomes of the others: after a failure no more are asked for, and those under way are kept.
        """
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "serve", "asking an images API") from error
        if len(prompts) != len(seeds):
            raise DataError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt.")
        pool = ThreadPoolExecutor(max(1, self.parallel), thread_name_prefix="images-api")
        timeout = httpx.Timeout(self.timeout, connect=min(CONNECT, self.timeout))
        # Connections are left before servers close them (after 5 s, many do): a request into a closed one is lost.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
        with httpx.Client(timeout=timeout, limits=limits, follow_redirects=False) as client, pool:
            asked = enumerate(zip(prompts, seeds, strict=True))
            for _ in pool.map(lambda each: keep(each[0], self._draw(client, *each[1])), asked):
                pass

    def _draw(self, client: httpx.Client, prompt: str, seed: int) -> Image.Image:
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "n": 1}
        for name, value in (("size", self.size), ("response_format", self.response_format)):
            if value is not None:
                body[name] = value
        if self.seed_field is not None:
            body[self.seed_field] = seed
        headers = {"Authorization": f"Bearer {self.key}"} if self.key is not None else {}
        answer = self._asked(client, "POST", f"{self.url.rstrip('/')}/images/generations", headers, body)
        try:
            found = dict(json.loads(answer)["data"][0])
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(f"{self.host} answered no pictures ({reason(error)}); is it an images API?") from error
        return self._picture(client, found)

    def _picture(self, client: httpx.Client, found: Mapping[str, Any]) -> Image.Image:
        if found.get("b64_json"):
            try:
                data = base64.b64decode(found["b64_json"], validate=True)
            except (binascii.Error, TypeError) as error:
                raise RunError(f"{self.host} answered with base64 that is broken ({error}); ask again.") from error
        elif found.get("url"):
            data = self._asked(client, "GET", self._known(str(found["url"])), {}, None)
        else:
            raise RunError(f"{self.host} answered without b64_json and url; set response_format to one of them.")
        try:
            return decode(data)
        except DataError as error:
            raise RunError(f"{self.host} gave a picture that cannot be read: {error}.") from error

    def _known(self, address: str) -> str:
        """The address, if pictures may be fetched from there: an answer must not send this machine anywhere else."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or parts.hostname not in (urlsplit(self.url).hostname, *self.hosts):
            raise RunError(
                f"{self.host} answered with the address of a picture at {parts.hostname!r}, which is not among the hosts to "
                "fetch from; add it to hosts, or set response_format=b64_json."
            )
        return address

    def _asked(
        self, client: httpx.Client, method: str, address: str, headers: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> bytes:
        """The body of a good answer, after as many tries as allowed."""
        import httpx

        for left in range(self.retries, -1, -1):
            wait = min(PATIENCE, 0.5 * 2 ** (self.retries - left))
            try:
                with client.stream(method, address, headers=dict(headers), json=body) as answer:
                    data = _read(answer)
                if answer.is_success:
                    return data
                said = f"{answer.status_code}: {_message(data)}"
                failed = answer.status_code in AGAIN or answer.status_code >= 500
                if method == "POST" and failed and not _undrawn(answer):
                    raise self._perhaps_drawn(said)
                if answer.status_code not in AGAIN or left == 0:
                    raise RunError(f"{self.host} refused ({said}); check the key, the model and the request.")
                wait = _after(answer.headers.get("retry-after"), wait)
            except httpx.HTTPError as error:
                said = f"{type(error).__name__}: {reason(error)}"
                if method == "POST" and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    raise self._perhaps_drawn(said) from error
                if left == 0:
                    tries = self.retries + 1
                    raise RunError(f"{self.host} did not answer in {tries} tries ({said}); check that it is up.") from error
            time.sleep(wait)
        raise RunError(f"{self.host} was not asked: retries is {self.retries}; it must be 0 or more.")

    def _perhaps_drawn(self, said: str) -> RunError:
        return RunError(
            f"{self.host} failed ({said}) and may have drawn the picture all the same, at a price, so it was not asked again; "
            "run again once it is well, with a longer timeout where it was only slow."
        )

    @property
    def host(self) -> str:
        """Scheme, host and port of `url`: never what may be secret in it."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _read(answer: httpx.Response) -> bytes:
    data = bytearray()
    for part in answer.iter_bytes():
        data += part
        if len(data) > LARGEST:
            raise RunError(f"{answer.url.host} answered with more than {LARGEST >> 20} MiB; ask for a smaller size.")
    return bytes(data)


def _undrawn(answer: httpx.Response) -> bool:
    """Whether a refusal says that no picture was drawn, so that asking again costs nothing twice."""
    later = answer.status_code in UNDRAWN or (answer.status_code == 503 and "retry-after" in answer.headers)
    return later and answer.headers.get("x-should-retry", "").lower() != "false"


def _message(data: bytes) -> str:
    """What an error answer says, in OpenAI's form or any other."""
    try:
        found = json.loads(data)["error"]
        return str(found["message"] if isinstance(found, dict) else found)[:300]
    except (ValueError, LookupError, TypeError):
        return " ".join(data.decode("utf-8", "replace").split())[:200] or "no reason given"


def _after(header: str | None, otherwise: float) -> float:
    """Seconds that Retry-After asks for, within patience."""
    try:
        return min(PATIENCE, max(0.0, float(header))) if header is not None else otherwise
    except ValueError:
        return otherwise
