"""`Reward`: what a picture is worth; `Backbone`: what several rewards look through at once; `Shelf`: each backbone once.

A reward is a backbone and a judgement of what the backbone saw. Rewards on one backbone share its forward: the engine calls
`see` once per backbone and `judge` once per reward. A module of this folder offers `REWARD`, a function

    def load(shelf: Shelf, *, setting: str = "default", ...) -> Reward

whose keywords are what a user can set: `{name: clip, model: ViT-L-14, pretrained: openai}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from flowalign.errors import DataError, RunError

B = TypeVar("B", bound="Backbone")


@dataclass(frozen=True)
class Card:
    """What a reward says of itself."""

    name: str
    """Its column in a score table."""
    title: str
    """One line for people."""
    range: tuple[float, float]
    """Smallest and largest value it can take; infinite where there is none."""
    better: Literal["higher", "lower"]
    licence: str
    """Of the weights, or of the method where there are none."""
    source: str
    """Authors, year, arXiv id or address."""
    weights: str
    """Origin and revision of the weights; "none" for a formula."""
    reads_prompt: bool
    """Whether the score depends on the prompt."""
    differentiable: bool
    """Whether `score_pixels` has a gradient with respect to the pixels."""
    fingerprint: str
    """Changes whenever a score could: weights, preprocessing, precision, version of the formula."""

    @property
    def sign(self) -> int:
        """+1 where higher is better, -1 where lower is."""
        return 1 if self.better == "higher" else -1


class Backbone(ABC):
    """A frozen tower, or plain pixels: turns pictures into what rewards judge."""

    key: str
    """Names what it computes; equal keys share one instance and one forward."""
    device: torch.device

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """A decoded RGB picture -> the tower's input for it, on the CPU: what a decoding worker does. A tensor `[3, H, W]`
        where all pictures get one shape."""

    @abstractmethod
    def see(self, inputs: Sequence[Any]) -> Any:
        """B inputs of `prepare` -> features of the batch, on `device`. A row depends on its own picture only."""

    def forget(self) -> None:  # noqa: B027  # most keep nothing
        """Drop what was kept of earlier prompts: which ones they were encoded together with may show in their last bits."""

    def prepare_pixels(self, pixels: Tensor) -> Sequence[Any]:
        """Pixels `[B, 3, H, W]` in [0, 1] -> inputs of `see`, differentiable. Raises RunError where there is no such way."""
        raise RunError(f"{self.key} has no gradient with respect to pixels; choose a reward whose card says differentiable.")


class Reward(ABC):
    """Scores pictures; a score depends on its own picture and prompt only, never on the rest of the batch."""

    card: Card
    backbone: Backbone

    @abstractmethod
    def judge(self, features: Any, prompts: Sequence[str]) -> Tensor:
        """What `backbone.see` gave for B pictures, and their prompts -> raw scores `[B]`, float32."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """B pictures (RGB, any sizes) and their prompts -> raw scores `[B]`, float32 on the CPU.

        Raises DataError for unequal lengths or a blank prompt where prompts are read, RunError for a score that is NaN or
        infinite: a failure is never a number.
        """
        if len(images) != len(prompts) or not images:
            raise DataError(
                f"{self.card.name} got {len(images)} pictures and {len(prompts)} prompts; give one prompt a picture."
            )
        if self.card.reads_prompt and (blank := [place for place, prompt in enumerate(prompts) if not prompt.strip()]):
            raise DataError(
                f"{self.card.name} got a blank prompt for picture {blank[0] + 1}; give one that says what it shows."
            )
        with torch.inference_mode():
            features = self.backbone.see([self.backbone.prepare(image.convert("RGB")) for image in images])
            return checked(self, self.judge(features, prompts), prompts)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pixels `[B, 3, H, W]` in [0, 1] and prompts -> scores `[B]` with a gradient. Raises RunError where there is none."""
        if not self.card.differentiable:
            raise RunError(f"{self.card.name} has no gradient; flowalign rewards lists those that have.")
        return self.judge(self.backbone.see(self.backbone.prepare_pixels(pixels)), prompts)


def checked(reward: Reward, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Scores as float32 on the CPU `[B]`. Raises RunError for another shape or a value that is not finite."""
    if scores.shape != (len(prompts),):
        raise RunError(f"{reward.card.name} gave scores of shape {tuple(scores.shape)} for {len(prompts)} pictures.")
    scores = scores.float().cpu()
    if not bool(torch.isfinite(scores).all()):
        place = int((~torch.isfinite(scores)).nonzero()[0])
        raise RunError(f"{reward.card.name} is {scores[place].item()} for the prompt {prompts[place]!r}: its model failed.")
    return scores


@dataclass
class Shelf:
    """Backbones by key, so that rewards that look through the same one share it; and where they live."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Precision of the towers; heads and scores are float32."""
    held: dict[str, Backbone] = field(default_factory=dict)

    def take(self, key: str, make: Callable[[], B]) -> B:
        """The backbone of that key, made if it is not there yet."""
        if key not in self.held:
            self.held[key] = make()
        return self.held[key]  # type: ignore[return-value]
