"""What a frozen tower sees in the pictures of a score table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from flowalign.data.columns import Pictures
from flowalign.data.images import decode
from flowalign.data.remote import at
from flowalign.errors import ConfigError, DataError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf
from flowalign.scoring.rewards.contrastive import Contrastive
from flowalign.scoring.table import ScoreTable

BATCH = 64


class Seen:
    """The image tower of a reward, and what it sees: unit vectors."""

    def __init__(self, spec: str | Mapping[str, Any], device: torch.device, *, progress: bool = True) -> None:
        """spec: a reward as `load_rewards` takes it, of a file the first one. Raises ConfigError for a reward without such a
        tower."""
        reward = load_rewards([spec], Shelf(device))[0]
        if not isinstance(reward.backbone, Contrastive):
            raise ConfigError(
                f"{reward.card.name} does not look through a tower of pictures and texts; name one that does, such as clip."
            )
        self._tower, self._progress = reward.backbone, progress
        self.fingerprint = reward.backbone.origin.fingerprint

    def __call__(self, table: ScoreTable) -> NDArray[np.float64]:
        """`[n, D]`, a row for each picture of the table. Raises DataError for a picture that cannot be read."""
        pictures, paths = Pictures(at(Path())), table.texts("path")
        out = []
        for start in tqdm(range(0, len(paths), BATCH), unit="batch", desc="features", disable=not self._progress):
            inputs = []
            for path in paths[start : start + BATCH]:
                try:
                    inputs.append(self._tower.prepare(decode(pictures.ref(path, str(path)).read())))
                except DataError as error:
                    raise DataError(f"the picture {path} of the table cannot be read: {error}.") from error
            with torch.inference_mode():
                out.append(self._tower.see(inputs).cpu().double().numpy())
        return np.concatenate(out)
