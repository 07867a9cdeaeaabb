"""A diffusers checkpoint as a generator of the images API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from flowalign.families.sampling import SamplerSettings, picture_size, sample


@dataclass(frozen=True)
class CheckpointGenerator:
    """A pipeline, such as `families.loading.open_checkpoint` gives; a picture depends on its prompt and seed only."""

    pipeline: Any
    settings: SamplerSettings
    batch_size: int = 8

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, size: tuple[int, int] | None) -> list[Image.Image]:
        """Raises ConfigError for a size that the checkpoint cannot draw."""
        settings = self.settings if size is None else replace(self.settings, width=size[0], height=size[1])
        picture_size(self.pipeline, settings)
        drawn = sample(self.pipeline, prompts, seeds, settings, batch_size=self.batch_size, progress=False)
        return [picture.convert("RGB") for _, picture in drawn]
