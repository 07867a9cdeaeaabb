"""Commands that look at comparisons."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import Command, positive, scale

FORMATS = ("auto", "folder", "jsonl", "parquet", "webdataset", "datasets")
DROPS = ("rows", "pictures", "same_picture", "repeated", "duplicates", "prompt_leakage", "picture_leakage", "unsafe")


def add(command: Command) -> None:
    audit = command("audit", _audit, "Say what is wrong with a set of comparisons, and which rows to leave out.")
    audit.add_argument("source", metavar="PAIRS", help="comparisons: a table, an archive, a folder, or a hub id")
    audit.add_argument("--table", type=Path, metavar="FILE", help="scores of their pictures, as flowalign score writes them")
    audit.add_argument("--against", metavar="PAIRS", help="another split: what of it is here as well?")
    audit.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="DIR", help="where to write (%(default)s)")
    audit.add_argument("--write-filtered", type=Path, metavar="FILE", help="a .jsonl file for the comparisons that stay")
    audit.add_argument(
        "--drop", nargs="+", choices=DROPS, default=DROPS, metavar="CHECK", help="what to filter by: %(choices)s (all)"
    )
    audit.add_argument("--unsafe-reward", metavar="NAME", help="the table's reward that flags unsafe pictures (nsfw)")
    audit.add_argument("--unsafe-above", type=scale, default=0.5, metavar="P", help="unsafe from this score on (%(default)s)")
    audit.add_argument("--format", choices=FORMATS, default="auto", help="%(choices)s (%(default)s)")
    audit.add_argument("--split", default="train", metavar="NAME", help="of a data set or of named shards (%(default)s)")
    audit.add_argument(
        "--columns",
        nargs="+",
        type=_column,
        default=[],
        metavar="KNOWN=NAME",
        help="known column=its name, as prompt=text",
    )
    audit.add_argument("--limit", type=positive, metavar="N", help="only the first N comparisons")
    audit.add_argument("--workers", type=positive, default=2, metavar="N", help="threads that decode (%(default)s)")


def _audit(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ["table", "against", "out", "write_filtered", "drop", "unsafe_reward", "unsafe_above"]
    names += ["format", "split", "limit", "workers"]
    columns = dict(options.columns)
    return runs.audit(options.source, columns=columns, **{name: getattr(options, name) for name in names})


def _column(text: str) -> tuple[str, str]:
    known, equals, name = text.partition("=")
    if not (known and equals and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not KNOWN=NAME, such as prompt=text")
    return known, name
