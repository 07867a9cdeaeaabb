"""PickScore: a CLIP-H fine-tuned on which of two pictures people picked for their own prompt.

Source: Kirstain et al., 2023, arXiv:2305.01569, equation 1. The probability that one picture is picked over another is
σ of the difference of their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowalign.scoring.rewards import transformers_tower
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.contrastive import Contrastive

PUBLISHED = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class PickScore(Reward):
    """exp(logit_scale) · cos(picture, prompt)"""

    card: Card
    backbone: Contrastive

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.backbone.scale * self.backbone.cosine(features, prompts)


def load(shelf: Shelf, *, model: str = PUBLISHED, processor: str = "") -> PickScore:
    """model: a hub id, or a folder that holds a transformers CLIP. processor: hub id or folder of tokenizer and
    preprocessing; by default the authors' choice for their model, and the model's own for another."""
    tower = transformers_tower.take(shelf, model, processor or (PROCESSOR if model == PUBLISHED else ""))
    return PickScore(
        Card(
            name="pickscore",
            title="PickScore: what people picked, by prompt",
            range=(-tower.scale, tower.scale),
            better="higher",
            licence=tower.origin.licence,
            source="Kirstain et al., 2023, arXiv:2305.01569",
            weights=tower.origin.weights,
            reads_prompt=True,
            differentiable=True,
            fingerprint=f"pickscore-1-{tower.origin.fingerprint}",
        ),
        tower,
    )


REWARD = load
