"""Opening several runs to draw pictures together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowalign.align.merged import open_beside
from flowalign.align.reference import second
from flowalign.errors import ConfigError
from flowalign.families.loading import find_lora, open_family
from flowalign.families.mixing import mix, oppose
from flowalign.families.sampling import generator_id
from flowalign.sections import Model


def open_mixed(
    shares: Mapping[str, float],
    negative: str | None,
    strength: float,
    *,
    guidance: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, str]:
    """(pipeline, what names it) of several checkpoints or runs that predict together, and of one that is moved away from.

    shares: of each in the mean of predictions, 1 in sum; LoRA runs of the first one's base share its tensors. negative: the run
    that speaks for the negative prompts of guidance, with `strength`; see `families.mixing`. Raises ConfigError for shares or a
    guidance that say nothing, CheckpointError for checkpoints that do not go together.
    """
    if not shares or not all(map(math.isfinite, shares.values())) or abs(sum(shares.values()) - 1) > 1e-6:
        said = " ".join(f"{name}={share:g}" for name, share in shares.items())
        raise ConfigError(f"predictions are mixed as {said or 'nothing'}; give each run a finite share, 1 in sum.")
    if not math.isfinite(strength):
        raise ConfigError(f"the negative run's strength is {strength}; give a finite number, such as 1.")
    if negative is not None and guidance <= 1:
        raise ConfigError(
            f"a negative run speaks for the negative prompt of guidance, and guidance {guidance:g} is none; give more than 1."
        )
    names = [*shares, *([] if negative is None else [negative])]
    run = find_lora(names[0])
    base, revision, variant = (names[0], None, None) if run is None else (run.base, run.revision, run.variant)
    model = Model(checkpoint=str(Path(base).expanduser()), revision=revision, variant=variant)
    family = open_family(base, dtype=dtype, device=device, revision=revision, variant=variant)
    denoisers = open_beside(names, model, family, said="the mixture")
    first, others, last = denoisers[0], denoisers[1 : len(shares)], denoisers[len(shares) :]
    first = second(first)  # hooks shall hang on none of the others
    pipeline = family.pipeline(first)
    name = generator_id(pipeline, *others, *last, {"shares": list(shares.values()), "negative": strength if last else None})
    if others:
        mix(first, others, list(shares.values()))
    for each in last:
        oppose(first, each, strength, family.negative)
    return pipeline, name
