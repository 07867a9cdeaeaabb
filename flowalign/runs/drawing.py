"""How a round of an improvement loop draws with a checkpoint, or a run over one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowalign.data.attached import Attached
from flowalign.data.cache import LatentCache
from flowalign.data.drawing import Row
from flowalign.data.images import geometry
from flowalign.device import choose_device
from flowalign.families.base import Family
from flowalign.families.loading import open_family
from flowalign.families.sampling import PRECISIONS, Drawn, SamplerSettings, write_images
from flowalign.families.steer import steered
from flowalign.files import write_text
from flowalign.rng import starting_noise
from flowalign.setup import load_family

if TYPE_CHECKING:
    from flowalign.runs.rounds import Loop

Keep = Callable[[bytes, Drawn], None]


def draw_and_keep(loop: Loop, source: str, rows: Sequence[Row], folder: Path) -> None:
    """Draw rows into `folder`, and what the sampler ended at into the run's cache, so that training encodes none of it.

    The base is told no weights, whatever its rows are judged by.
    """
    family = _open(loop, source)
    pipeline, steers = family.pipeline(family.denoiser), loop.config.steer is not None and source != loop.policy(0)
    if steers:
        steered(pipeline, source)
    _draw(loop, pipeline, rows, folder, _keeping(loop, family), told=steers)


def draw_alone(loop: Loop, source: str, rows: Sequence[Row], folder: Path) -> None:
    """Draw rows into `folder`."""
    family = _open(loop, source)
    _draw(loop, family.pipeline(family.denoiser), rows, folder, None)


def _open(loop: Loop, source: str) -> Family:
    return open_family(
        source,
        dtype=PRECISIONS[loop.config.draw.precision],
        device=choose_device(loop.device),
        **loop.version(source),
    )


def _draw(loop: Loop, pipeline: Any, rows: Sequence[Row], folder: Path, keep: Keep | None, told: bool = False) -> None:
    how = loop.config.draw
    write_images(
        folder,
        pipeline,
        [row.prompt for row in rows],
        [row.seed for row in rows],
        SamplerSettings(how.sampler, how.steps, how.guidance, how.resolution, how.resolution, how.precision),
        weights=[row.weights for row in rows] if told else None,
        keep=keep,
        batch_size=how.batch_size,
        progress=loop.progress,
    )


def _keeping(loop: Loop, family: Family) -> Keep:
    cfg = loop.config
    side = cfg.draw.resolution or family.resolution
    store = LatentCache(loop.cache, **encoders(loop), resolution=side, checkpoint=loop.model.checkpoint)

    def keep(data: bytes, each: Drawn) -> None:
        latents, noise = each.latents.float().cpu(), each.seed if cfg.switches.noise == "stored" else None
        beside = {} if noise is None else {"noise": starting_noise(noise, latents.shape)[0]}
        path = store.image_path(Attached(noise=noise).digest(hashlib.sha256(data).digest()), False)
        cut = geometry(each.picture, store.resolution)
        store.write_image(path, latents, torch.zeros_like(latents), cut, beside)

    return keep


def encoders(loop: Loop) -> dict[str, str]:
    """Fingerprints of the encoders as training has them, by which entries of the cache are named."""
    path = loop.folder / "encoders.json"
    if not path.is_file():
        family = load_family(loop.aligning(0), torch.device("cpu"))
        found = {f"{kind}_fingerprint": family.fingerprint(f"{kind}s") for kind in ("image", "prompt")}
        write_text(path, json.dumps(found, indent=1) + "\n")
    return json.loads(path.read_text())
