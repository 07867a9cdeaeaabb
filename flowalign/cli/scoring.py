"""Commands that score pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import PRECISIONS, Command, positive

FORMATS = ("auto", "folder", "jsonl", "parquet", "webdataset", "datasets")


def add(command: Command) -> None:
    score = command("score", _score, "Score pictures by several rewards into one table; flowalign rewards lists them.")
    score.add_argument("source", metavar="SOURCE", help="a folder of pictures, a table, an archive, comparisons, or a hub id")
    score.add_argument(
        "--rewards", nargs="+", required=True, metavar="NAME|FILE", help="names, or YAML files that list rewards with settings"
    )
    score.add_argument("--out", type=Path, default=Path("scores.parquet"), metavar="FILE", help="the table (%(default)s)")
    score.add_argument("--prompt", metavar="TEXT", help="what all pictures were made for, instead of what the source says")
    score.add_argument("--image-column", metavar="NAME", help="by default found by its name")
    score.add_argument("--prompt-column", metavar="NAME", help="by default prompt or caption")
    score.add_argument("--format", choices=FORMATS, default="auto", help="%(choices)s (%(default)s)")
    score.add_argument("--split", default="train", metavar="NAME", help="of a data set or of named shards (%(default)s)")
    score.add_argument("--limit", type=positive, metavar="N", help="only the first N pictures")
    score.add_argument("--batch-size", type=positive, default=32, metavar="N", help="pictures scored together (%(default)s)")
    score.add_argument("--workers", type=positive, metavar="N", help="threads that decode (one a core, at most 8)")
    score.add_argument("--engine", choices=("local", "ray"), default="local", help="here, or on a Ray cluster (%(default)s)")
    score.add_argument("--replicas", type=positive, default=2, metavar="N", help="ray: copies of the rewards (%(default)s)")
    score.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    score.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the towers: %(choices)s (%(default)s)")
    score.add_argument("--cache", type=Path, metavar="DIR", help="by default $FLOWALIGN_CACHE or ~/.cache/flowalign")


def _score(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs
    from flowalign.errors import RunError

    source = ("prompt", "image_column", "prompt_column", "format", "split", "limit")
    how = ("batch_size", "workers", "device", "precision", "cache", "engine", "replicas")
    settings = {name: getattr(options, name) for name in ("out", *source, *how)}
    try:
        return runs.score(options.source, options.rewards, **settings)
    except KeyboardInterrupt:
        raise RunError("interrupted; what was scored is kept, so the same command goes on from there.") from None
