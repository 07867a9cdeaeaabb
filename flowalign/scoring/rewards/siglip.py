"""SigLIP: the log-odds that a prompt belongs to a picture, by a tower that was trained to answer just that.

Source: Zhai et al., 2023, arXiv:2303.15343. The probability is σ(score).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowalign.errors import CheckpointError
from flowalign.scoring.rewards import towers
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.contrastive import Contrastive


@dataclass(frozen=True)
class Siglip(Reward):
    """exp(logit_scale) · cos(picture, prompt) + logit_bias"""

    card: Card
    backbone: Contrastive

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.backbone.scale * self.backbone.cosine(features, prompts) + self.backbone.bias


def load(shelf: Shelf, *, model: str = "google/siglip-so400m-patch14-384", pretrained: str = "") -> Siglip:
    """model, pretrained: see `towers.take`. Raises CheckpointError for a tower without a logit bias, which is a CLIP."""
    tower = towers.take(shelf, model, pretrained)
    if tower.bias == 0:
        raise CheckpointError(f"{model} has no logit bias, so it is no SigLIP; use the reward clip for it.")
    return Siglip(
        Card(
            name="siglip",
            title="SigLIP: log-odds that the prompt belongs to the picture",
            range=(-math.inf, math.inf),
            better="higher",
            licence=tower.origin.licence,
            source="Zhai et al., 2023, arXiv:2303.15343",
            weights=tower.origin.weights,
            reads_prompt=True,
            differentiable=True,
            fingerprint=f"siglip-1-{tower.origin.fingerprint}",
        ),
        tower,
    )


REWARD = load
