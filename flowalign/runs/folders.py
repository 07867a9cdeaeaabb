"""Verbs about what lies on disk: run folders, exports, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from flowalign import config as configuration
from flowalign.data.cache import clear, usage
from flowalign.errors import CheckpointError
from flowalign.families.loading import LORA
from flowalign.files import atomic
from flowalign.report.card import write_card
from flowalign.report.page import write_report
from flowalign.sources import cache_folder
from flowalign.train.trainable import kohya


def report(run: Path) -> dict[str, Any]:
    """Write the run's page, and the model card beside its weights, from what its folder holds."""
    path = write_report(run)
    if (run / "weights").is_dir():
        write_card(run)
    return {"report": str(path), "summary": f"report: {path}"}


def export_kohya(run: Path, out: Path | None = None) -> dict[str, Any]:
    """Write a run's LoRA as one file in kohya's format, for A1111 and ComfyUI. Raises CheckpointError."""
    source = run / "weights" / LORA
    if not source.is_file():
        raise CheckpointError(f"{run} holds no weights/{LORA}; give the folder of a finished LoRA run.")
    settings = configuration.load(run / "config.yaml").trainable
    path = out or run / "weights" / "kohya.safetensors"
    alpha = settings.rank if settings.alpha is None else settings.alpha
    with atomic(path) as temporary:
        save_file(kohya(load_file(source), alpha / settings.rank), temporary)
    return {"file": str(path), "summary": f"LoRA in kohya's format: {path}"}


def cache_list(folder: Path | None) -> dict[str, Any]:
    """What the cache of latents and conditioning holds, per encoder."""
    path = cache_folder(folder)
    found = usage(path)
    lines = [
        f"{store['store']}: {store['entries']} entries, {store['bytes'] / 2**20:.1f} MiB, {store['checkpoint']}"
        for store in found["stores"]
    ]
    lines.append(f"{path}: {found['entries']} entries, {found['bytes'] / 2**20:.1f} MiB")
    return {"folder": str(path), **found, "summary": "\n".join(lines)}


def cache_clear(folder: Path | None, fingerprint: str | None) -> dict[str, Any]:
    """Delete cached latents and conditioning, of one encoder or of all."""
    path = cache_folder(folder)
    freed = clear(path, fingerprint)
    return {"folder": str(path), "freed": freed, "summary": f"{freed / 2**20:.1f} MiB freed in {path}"}
