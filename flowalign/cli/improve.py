"""The command that improves a model on its own pictures, round after round."""

from __future__ import annotations

import argparse
from typing import Any

from flowalign.cli.arguments import Command, add_run, run_settings


def add(command: Command) -> None:
    improve = command("improve", _improve, "Improve a model on its own pictures: draw, score, select, align, again and again.")
    add_run(improve)


def _improve(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs
    from flowalign.improve_settings import ImproveConfig

    settings = run_settings(options, lambda path, overrides: config.load_tree(ImproveConfig, path, overrides))
    return runs.improve(settings, resume=options.resume)
