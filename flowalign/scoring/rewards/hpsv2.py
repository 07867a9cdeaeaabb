"""HPS v2: a CLIP-H fine-tuned on which of several pictures people preferred for a prompt.

Source: Wu et al., 2023, arXiv:2306.09341; version 2.1 was published with the code in 2024. The score is the plain cosine, as
the authors' package returns it; their tables show it times 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flowalign.errors import CheckpointError, allowed
from flowalign.scoring.rewards import open_clip_tower, published
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.contrastive import Contrastive

VERSIONS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"
# The authors turn a picture into floats first and resize those, the longer side to fit, black around.
LOOK = {"fit": "longest", "fill": 0, "arithmetic": "floats"}


@dataclass(frozen=True)
class HpsV2(Reward):
    """cos(picture, prompt)"""

    card: Card
    backbone: Contrastive

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.backbone.cosine(features, prompts)


def load(shelf: Shelf, *, weights: str = "v2.1", model: str = "ViT-H-14") -> HpsV2:
    """weights: "v2.0", "v2.1", or a checkpoint of that layout. model: open_clip's name or configuration of its architecture.

    Raises CheckpointError for weights that are missing or do not fit.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        if weights not in VERSIONS:
            raise CheckpointError(f"{weights!r} is no file and no version of HPS v2; {allowed(weights, VERSIONS)}, or a file.")
        path = published.from_hub(REPOSITORY, VERSIONS[weights])
    tower = open_clip_tower.take(shelf, model, str(path), LOOK)
    return HpsV2(
        Card(
            name="hpsv2",
            title="HPS v2: what people preferred, by prompt",
            range=(-1.0, 1.0),
            better="higher",
            licence="Apache-2.0",
            source="Wu et al., 2023, arXiv:2306.09341",
            weights=f"{REPOSITORY} {weights}" if weights in VERSIONS else path.name,
            reads_prompt=True,
            differentiable=True,
            fingerprint=f"hpsv2-1-{tower.origin.fingerprint}",
        ),
        tower,
    )


REWARD = load
