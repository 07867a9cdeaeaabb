"""Commands about what lies on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import (
    Command,
)
from flowalign.errors import ConfigError


def add(command: Command) -> None:
    export = command("export", _export, "Write a run's LoRA as one file in kohya's format, for A1111 and ComfyUI.")
    export.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished LoRA run or loop")
    export.add_argument("--out", type=Path, metavar="FILE", help="by default weights/kohya.safetensors in the run")

    cache = command("cache", _cache, "List or clear the encoded pictures and prompts.")
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    cache.add_argument("--fingerprint", metavar="F", help="clear only what the encoder with this fingerprint made")
    cache.add_argument("--folder", type=Path, metavar="DIR", help="by default $FLOWALIGN_CACHE or ~/.cache/flowalign")


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.export_kohya(options.run, options.out)


def _cache(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    if options.action == "clear":
        return runs.cache_clear(options.folder, options.fingerprint)
    if options.fingerprint is not None:
        raise ConfigError(f"--fingerprint {options.fingerprint} only goes with clear: flowalign cache clear --fingerprint F.")
    return runs.cache_list(options.folder)
