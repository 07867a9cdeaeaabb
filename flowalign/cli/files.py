"""Commands about what lies on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import (
    Command,
)
from flowalign.errors import ConfigError

KINDS = ("images", "prompts", "bank")


def add(command: Command) -> None:
    export = command("export", _export, "Write a run's LoRA as one file in kohya's format, for A1111 and ComfyUI.")
    export.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished LoRA run or loop")
    export.add_argument("--out", type=Path, metavar="FILE", help="by default weights/kohya.safetensors in the run")

    cache = command("cache", _cache, "List or clear encoded pictures and prompts, and reference banks.")
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    cache.add_argument("--fingerprint", metavar="F", help="clear only what is of this encoder, denoiser, bank or folder")
    cache.add_argument("--kind", choices=KINDS, help="clear only this kind of them")
    cache.add_argument("--folder", type=Path, metavar="DIR", help="by default $FLOWALIGN_CACHE or ~/.cache/flowalign")


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.export_kohya(options.run, options.out)


def _cache(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    if options.action == "clear":
        return runs.cache_clear(options.folder, options.fingerprint, options.kind)
    for name in ("fingerprint", "kind"):
        if (value := getattr(options, name)) is not None:
            raise ConfigError(f"--{name} {value} only goes with clear: flowalign cache clear --{name} {value}.")
    return runs.cache_list(options.folder)
