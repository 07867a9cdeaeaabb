"""Rewards over HTTP: pictures in, numbers out, no pickle in between."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image
from starlette.responses import JSONResponse, Response

from flowalign.errors import FlowalignError, allowed
from flowalign.scoring.rewards.base import Card, Reward, checked
from flowalign.serve.batching import Batcher, Full, Late, Worker
from flowalign.serve.formats import Untouched, lossless, open_picture
from flowalign.serve.limits import Limits
from flowalign.serve.metrics import Metrics
from flowalign.serve.problems import Problem, refused

Judged = dict[str, float | str]
"""Reward -> its raw score, or a sentence that says why there is none."""


class Scorer:
    """Rewards that look through the same backbone share its forward, and so do requests that come together."""

    def __init__(self, rewards: Sequence[Reward], worker: Worker, limits: Limits, metrics: Metrics) -> None:
        self.rewards = {reward.card.name: reward for reward in rewards}
        self.limits = limits
        self.batcher: Batcher[tuple[Image.Image, str, tuple[str, ...]], Judged] = Batcher(
            self._judged,
            worker,
            size=limits.batch,
            wait=limits.batch_wait,
            capacity=limits.batch_queue,
            key=lambda item: item[2],
            seen=lambda count: metrics.batch_pictures.observe(count, "rewards"),
        )

    async def score(self, body: dict[str, Any]) -> Response:
        """Raises Problem: 400 for what cannot be scored, 503 where it cannot be done in time."""
        names = self._names(body.get("rewards"))
        entries = body.get("images")
        if not isinstance(entries, list) or not 1 <= len(entries) <= self.limits.scored:
            raise refused(f"images must be a list of 1 to {self.limits.scored} pictures.", param="images")
        reads = any(self.rewards[name].card.reads_prompt for name in names)
        items = await asyncio.to_thread(lambda: [self._item(place, entry, reads) for place, entry in enumerate(entries)])
        deadline = asyncio.get_running_loop().time() + self.limits.generate_timeout
        tasks = [asyncio.ensure_future(self.batcher.submit((image, prompt, names), deadline)) for image, prompt in items]
        try:
            judged = await asyncio.gather(*tasks)
        except (Late, Full):
            raise Problem(
                503, "There is more to score than can be finished in time.", code="server_busy", headers={"retry-after": "5"}
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        data = [
            {
                "index": place,
                "scores": {name: found if isinstance(found, float) else None for name, found in each.items()},
                "errors": {name: found for name, found in each.items() if isinstance(found, str)},
            }
            for place, each in enumerate(judged)
        ]
        return JSONResponse({"object": "list", "data": data, "rewards": [_shown(self.rewards[name].card) for name in names]})

    def _names(self, wanted: Any) -> tuple[str, ...]:
        if wanted is None:
            return tuple(self.rewards)
        if not isinstance(wanted, list) or not wanted or not all(isinstance(name, str) for name in wanted):
            raise refused("rewards must be a list of names, or left out for all.", param="rewards")
        for name in wanted:
            if name not in self.rewards:
                raise refused(f"the reward {name[:100]!r} is not here; {allowed(name, self.rewards)}.", param="rewards")
        return tuple(dict.fromkeys(wanted))

    def _item(self, place: int, entry: Any, reads: bool) -> tuple[Image.Image, str]:
        where = f"images[{place}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("b64_json"), str):
            raise refused(f"{where} must be an object with a b64_json.", param=where)
        prompt = entry.get("prompt", "")
        if not isinstance(prompt, str) or len(prompt) > self.limits.prompt or (reads and not prompt.strip()):
            raise refused(f"{where}.prompt must be a text of at most {self.limits.prompt} characters.", param=f"{where}.prompt")
        try:
            data = base64.b64decode(entry["b64_json"], validate=True)
        except (binascii.Error, ValueError):
            raise refused(f"{where}.b64_json is not base64.", param=f"{where}.b64_json") from None
        if not lossless(data):
            raise refused(f"{where} must be a PNG or a lossless WebP: what is scored is the picture.", param=where)
        try:
            return open_picture(data, self.limits).image, prompt
        except Untouched as reason:
            raise refused(f"{where} cannot be scored: {REASONS[str(reason)]}.", param=where) from None

    def _judged(self, items: Sequence[tuple[Image.Image, str, tuple[str, ...]]]) -> list[Judged]:
        """On the model's thread: one forward per backbone. A reward that fails costs its own numbers only, and a picture that
        spoils a batch its own: the batcher then tries each alone.
        """
        import torch

        prompts, names = [prompt for _, prompt, _ in items], items[0][2]
        out: list[Judged] = [{} for _ in items]
        seen: dict[str, Any] = {}
        with torch.inference_mode():
            for name in names:
                reward = self.rewards[name]
                found: Sequence[float | str]
                try:
                    backbone = reward.backbone
                    if backbone.key not in seen:
                        seen[backbone.key] = backbone.see([backbone.prepare(image) for image, _, _ in items])
                    found = checked(reward, reward.judge(seen[backbone.key], prompts), prompts).tolist()
                except Exception as error:
                    if len(items) > 1:
                        raise
                    found = [_sentence(error)]
                for row, value in zip(out, found, strict=True):
                    row[name] = value
        return out


REASONS = {
    "size": "it is too large",
    "format": "it is neither PNG nor WebP",
    "animation": "it moves",
    "transparency": "it is transparent in places",
    "picture": "it is damaged",
}


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, FlowalignError) else f"the model failed: {type(error).__name__}."


def _shown(card: Card) -> dict[str, Any]:
    """A card as JSON, which has no infinity: null where a range has no end."""
    low, high = (bound if math.isfinite(bound) else None for bound in card.range)
    return asdict(card) | {"range": [low, high]}
