"""CLIPScore: the cosine between a picture and its prompt in the space of any CLIP.

Source: Hessel et al., 2021, arXiv:2104.08718. Their score is 2.5 · max(cos, 0), which orders pictures alike but for those
below zero, where it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowalign.errors import ConfigError
from flowalign.scoring.rewards import towers
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.contrastive import Contrastive


@dataclass(frozen=True)
class ClipScore(Reward):
    """scale · cos(picture, prompt)"""

    card: Card
    backbone: Contrastive
    scale: float

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * self.backbone.cosine(features, prompts)


def load(shelf: Shelf, *, model: str = "ViT-L-14", pretrained: str = "", scale: float = 1.0) -> ClipScore:
    """model, pretrained: see `towers.take`. scale: 1 for the cosine itself, 100 for what torchmetrics calls CLIPScore.

    Raises ConfigError for a scale that is not above zero.
    """
    if not 0 < scale < float("inf"):
        raise ConfigError(f"scale is {scale}; it must be above 0, such as 1 for the cosine.")
    tower = towers.take(shelf, model, pretrained)
    return ClipScore(
        Card(
            name="clip",
            title="CLIPScore: how well the picture fits its prompt",
            range=(-scale, scale),
            better="higher",
            licence=tower.origin.licence,
            source="Hessel et al., 2021, arXiv:2104.08718",
            weights=tower.origin.weights,
            reads_prompt=True,
            differentiable=True,
            fingerprint=f"clip-1-{scale!r}-{tower.origin.fingerprint}",
        ),
        tower,
        scale,
    )


REWARD = load
