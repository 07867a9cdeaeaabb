"""The command that makes one run of several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import Command, positive

WAYS = ("linear", "slerp", "warp")


def add(command: Command) -> None:
    merge = command("merge", _merge, "Merge the weights of several runs of one base into one run.")
    merge.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of one base, LoRAs or whole models")
    merge.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each run; equal ones if left out")
    merge.add_argument(
        "--how",
        choices=WAYS,
        default="linear",
        help="sum of the changes, along the arc between them, or that and back to the base (%(default)s)",
    )
    merge.add_argument("--back", type=float, metavar="X", help="share of the way back to the base (0; for warp 0.5)")
    merge.add_argument(
        "--rank", type=positive, metavar="R", help="largest rank of a merged LoRA; by default the sum, which is exact"
    )
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder to write")


def _merge(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.merge(
        options.runs,
        out=options.out,
        weights=options.weights,
        how=options.how,
        back=options.back,
        rank=options.rank,
    )
