"""Commands about what can be scored."""

from __future__ import annotations

import argparse
from typing import Any

from flowalign.cli.arguments import Command


def add(command: Command) -> None:
    command("rewards", _rewards, "List what scores pictures: range, direction, licence, gradient, settings.")


def _rewards(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.list_rewards()
