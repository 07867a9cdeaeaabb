"""The command that improves a model on its own pictures, round after round."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import Command, add_overrides, run_settings


def add(command: Command) -> None:
    improve = command("improve", _improve, "Improve a model on its own pictures: draw, score, select, align, again and again.")
    improve.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; with --resume also a run folder")
    add_overrides(improve)
    improve.add_argument("--resume", action="store_true", help="continue where an earlier run of this output folder stopped")
    improve.add_argument("--output", type=Path, metavar="DIR", help="the run folder, instead of the configuration's output")


def _improve(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs
    from flowalign.improve_settings import ImproveConfig

    settings = run_settings(options, lambda path, overrides: config.load_tree(ImproveConfig, path, overrides))
    return runs.improve(settings, resume=options.resume)
