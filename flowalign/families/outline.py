"""Outlines: the parts of a checkpoint built from their settings on the meta device, which has shapes but no values.

Nothing of it takes memory or time worth mentioning, whatever the model's size, and all of it can be run to be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from flowalign.errors import CheckpointError, reason
from flowalign.families.loading import FAILURES, INDEX, Located

META = torch.device("meta")


def outline_parts(located: Located, pipeline_class: type, parts: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """`loading.load_parts` without weights: modules of these settings on the meta device. Raises CheckpointError."""
    index = located.settings(INDEX)
    found: dict[str, Any] = {}
    for name in parts:
        library, kind = index.get(name) or (None, None)
        try:
            if name == "scheduler":
                found[name] = getattr(diffusers, kind).from_config(located.settings("scheduler/scheduler_config.json"))
                continue
            settings = located.settings(f"{name}/config.json")
            with META:
                if library == "diffusers":
                    found[name] = getattr(diffusers, kind).from_config(settings)
                else:
                    model = getattr(transformers, kind)
                    found[name] = model(model.config_class.from_dict(settings))
        except FAILURES as error:
            raise CheckpointError(
                f"{located.name} has a {name} of class {kind}, which cannot be built from its settings ({reason(error)}); save "
                f"the whole {pipeline_class.__name__} again with save_pretrained."
            ) from error
        nn.Module.to(found[name], dtype).requires_grad_(False).eval()  # the libraries' own `to` warns of lost values
    return found


def clip_states(clip: Any, count: int) -> tuple[Tensor, Tensor]:
    """States `[count, L, D]` of a CLIP encoder's last but one layer and its pooled or projected ones `[count, P]`."""
    out = clip(tokens(count, clip.config.max_position_embeddings), output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds if "text_embeds" in out else out.pooler_output


def tokens(count: int, length: int) -> Tensor:
    """Token numbers `[count, length]` that a text encoder's outline can be given."""
    return torch.zeros(count, length, dtype=torch.long, device=META)
