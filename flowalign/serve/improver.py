"""The flow behind an image API: moves pictures within a deadline, or leaves them as they are and says why."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from flowalign.serve.addresses import NotAllowed
from flowalign.serve.batching import Batcher, Full, Late, Worker
from flowalign.serve.fetch import Fetcher, FetchError
from flowalign.serve.formats import Picture, Untouched, encode, open_picture, same_pixels
from flowalign.serve.limits import Limits
from flowalign.serve.metrics import Metrics
from flowalign.serve.store import PictureStore

Improve = Callable[[Sequence[Image.Image], Sequence[str]], list[Image.Image]]
"""RGB pictures and their prompts -> as many pictures of the same sizes."""
HEADER = "x-flowalign"
log = logging.getLogger("flowalign.serve")


@dataclass(frozen=True)
class Outcome:
    """What became of the pictures of one answer."""

    count: int
    untouched: dict[int, str] = field(default_factory=dict)
    """Place of a picture that stayed as it came -> the reason in one word."""

    def header(self) -> str:
        """`applied`; `untouched; reason=deadline`; `partial; untouched=0,2; reason=picture+deadline`."""
        if not self.untouched:
            return "applied"
        reasons = "+".join(sorted(set(self.untouched.values())))
        if len(self.untouched) == self.count:
            return f"untouched; reason={reasons}"
        return f"partial; untouched={','.join(map(str, sorted(self.untouched)))}; reason={reasons}"

    def note(self, metrics: Metrics) -> None:
        if applied := self.count - len(self.untouched):
            metrics.pictures.add("applied", "", by=applied)
        for reason, count in Counter(self.untouched.values()).items():
            metrics.pictures.add("untouched", reason, by=count)


def untouched(count: int, reason: str) -> Outcome:
    return Outcome(count, dict.fromkeys(range(count), reason))


class Improver:
    """Reasons for a picture to stay as it came: `deadline`, `busy`, `flow` (it failed), `fetch` and `address` (an answer by
    url), `store` (no room to keep it), `entry` (neither b64_json nor url), and those of `formats.open_picture`.
    """

    def __init__(
        self, improve: Improve, worker: Worker, limits: Limits, metrics: Metrics, store: PictureStore, fetcher: Fetcher | None
    ) -> None:
        self.limits, self.metrics, self.store, self.fetcher = limits, metrics, store, fetcher
        self.codecs = ThreadPoolExecutor(2, thread_name_prefix="flowalign-codec")
        self.batcher: Batcher[tuple[Image.Image, str], Image.Image] = Batcher(
            lambda items: _improved(improve, items),
            worker,
            size=limits.batch,
            wait=limits.batch_wait,
            capacity=limits.batch_queue,
            seen=lambda count: metrics.batch_pictures.observe(count, "flow"),
        )

    async def entries(
        self, entries: Sequence[dict[str, Any]], prompt: str, link: Callable[[str], str]
    ) -> tuple[list[dict[str, Any]], Outcome]:
        """Entries of an answer (`b64_json` or `url`), moved. link: token of a kept picture -> its address."""
        deadline = asyncio.get_running_loop().time() + self.limits.flow_timeout
        done = await asyncio.gather(*(self._guarded(self._entry(entry, prompt, deadline, link), deadline) for entry in entries))
        reasons = {place: each for place, each in enumerate(done) if isinstance(each, str)}
        moved = [entry if isinstance(each, str) else each for entry, each in zip(entries, done, strict=True)]
        return moved, Outcome(len(entries), reasons)

    async def pictures(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[list[Image.Image], Outcome]:
        """Pictures that were drawn here, moved."""
        deadline = asyncio.get_running_loop().time() + self.limits.flow_timeout
        tasks = (
            self._guarded(self._moved(image, prompt, deadline), deadline) for image, prompt in zip(images, prompts, strict=True)
        )
        done = await asyncio.gather(*tasks)
        reasons = {place: each for place, each in enumerate(done) if isinstance(each, str)}
        return [image if isinstance(each, str) else each for image, each in zip(images, done, strict=True)], Outcome(
            len(images), reasons
        )

    async def _guarded(self, work: Any, deadline: float) -> Any:
        """What `work` returns, or the reason why there is nothing: a picture that is there is never lost to a failure here."""
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except Untouched as reason:
            return str(reason)
        except (Late, TimeoutError):
            return "deadline"
        except Full:
            return "busy"
        except NotAllowed as why:
            self.metrics.refused_addresses.add()
            log.warning("a picture's address is not fetched: %s", why)
            return "address"
        except FetchError as why:
            log.warning("a picture could not be fetched: %s", why)
            return "fetch"
        except Exception as error:
            log.warning("the flow failed: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])
            return "flow"

    async def _entry(self, entry: dict[str, Any], prompt: str, deadline: float, link: Callable[[str], str]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        encoded, url = entry.get("b64_json"), entry.get("url")
        if isinstance(encoded, str):
            data = await loop.run_in_executor(self.codecs, _from_base64, encoded, self.limits.picture)
        elif isinstance(url, str) and self.fetcher is not None:
            data = await self.fetcher.get(url)
        else:
            raise Untouched("entry")
        picture = await loop.run_in_executor(self.codecs, open_picture, data, self.limits)
        moved = await self._moved(picture.image, prompt, deadline)
        after = await loop.run_in_executor(self.codecs, _encoded, picture, moved, data)
        if isinstance(encoded, str):
            return entry | {"b64_json": base64.b64encode(after).decode("ascii")}
        token = self.store.put(after, picture.format)
        if token is None:
            raise Untouched("store")
        return entry | {"url": link(token)}

    async def _moved(self, image: Image.Image, prompt: str, deadline: float) -> Image.Image:
        return await self.batcher.submit((image, prompt), deadline)

    def close(self) -> None:
        self.codecs.shutdown(wait=False, cancel_futures=True)


def _from_base64(text: str, limit: int) -> bytes:
    if len(text) > limit * 4 // 3 + 4:
        raise Untouched("size")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Untouched("picture") from None


def _encoded(picture: Picture, moved: Image.Image, data: bytes) -> bytes:
    """The moved picture as the original was encoded; the original's very bytes where nothing moved."""
    return data if same_pixels(picture.image, moved) else encode(moved, picture.format, picture.options)


def _improved(improve: Improve, items: Sequence[tuple[Image.Image, str]]) -> list[Image.Image]:
    """On the model's thread. Raises ValueError for a flow that gives something else than it should."""
    after = improve([image for image, _ in items], [prompt for _, prompt in items])
    if len(after) != len(items):
        raise ValueError(f"it gave {len(after)} pictures for {len(items)}")
    for (before, _), picture in zip(items, after, strict=True):
        if not isinstance(picture, Image.Image) or picture.size != before.size:
            raise ValueError(f"it gave {getattr(picture, 'size', type(picture).__name__)} for a picture of {before.size}")
    return [picture.convert("RGB") for picture in after]
