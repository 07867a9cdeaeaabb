"""Commands between scores and training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import PRECISIONS, Command, natural, positive, scale

LINKS = ("temperature", "platt", "isotonic")
PICKERS = ("best_worst", "margin", "frs", "intersection", "majority", "random")
ORDERS = ("potential", "explicit", "implicit", "random")


def add(command: Command) -> None:
    calibrate = command(
        "calibrate", _calibrate, "Make the rewards of a score table comparable, with labelled pairs or without."
    )
    calibrate.add_argument("table", type=Path, metavar="TABLE", help="what flowalign score wrote")
    calibrate.add_argument("--pairs", metavar="FILE", help="comparisons of pictures in the table: what people preferred")
    calibrate.add_argument("--base", type=Path, metavar="TABLE", help="scores of the base model's pictures, same prompts")
    calibrate.add_argument("--method", choices=LINKS, default="temperature", help="%(choices)s (%(default)s)")
    calibrate.add_argument("--fuse", action="store_true", help="fit weights of the rewards on the pairs, and combine by them")
    calibrate.add_argument(
        "--ties", choices=("half", "rao_kupper", "davidson"), default="half", help="%(choices)s (%(default)s)"
    )
    calibrate.add_argument(
        "--by",
        choices=("mean", "sum", "min", "majority", "fused"),
        default="mean",
        help="how rewards are combined (%(default)s)",
    )
    calibrate.add_argument(
        "--apply", type=Path, dest="fitted", metavar="JSON", help="an earlier calibration, instead of a new one"
    )
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="the new table; by default NAME-calibrated.parquet")
    calibrate.add_argument("--seed", type=natural, default=0, metavar="N", help="of folds and intervals (%(default)s)")

    select = command("select", _select, "Make comparisons of a calibrated table, or keep the comparisons that teach most.")
    select.add_argument("source", type=Path, metavar="TABLE|PAIRS", help="a calibrated score table, or a file of comparisons")
    select.add_argument(
        "--by",
        choices=dict.fromkeys((*PICKERS, *ORDERS)),
        required=True,
        help="table: " + ", ".join(PICKERS) + "; pairs: " + ", ".join(ORDERS),
    )
    select.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .jsonl file, for data.train")
    select.add_argument(
        "--set",
        action="extend",
        nargs="+",
        type=_setting,
        default=[],
        dest="settings",
        metavar="a=c",
        help="top, least, share, seed",
    )
    select.add_argument("--most", type=positive, metavar="N", help="pairs of a prompt")
    select.add_argument("--ties", choices=("drop", "keep"), default="drop", help="pairs with equal scores (%(default)s)")
    select.add_argument("--weights", choices=("even", "histogram"), default="even", help="of pairs (%(default)s)")
    select.add_argument("--ratio", type=scale, default=0.4, help="pairs: the share that is kept (%(default)s)")
    select.add_argument("--potential-weight", type=scale, default=1.0, metavar="W", help="w of the potential (%(default)s)")
    select.add_argument("--seed", type=natural, default=0, metavar="N", help="of random (%(default)s)")

    margins = command("margins", _margins, "Add what a model thinks of comparisons: its own margin, without a reference.")
    margins.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN", help="a diffusers folder, a hub id or a run folder")
    margins.add_argument("source", metavar="PAIRS", help="comparisons")
    margins.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a .jsonl file with the column implicit_margin"
    )
    margins.add_argument("--draws", type=positive, default=32, metavar="N", help="(t, noise) of each comparison (%(default)s)")
    margins.add_argument("--batch-size", type=positive, default=16, metavar="N", help="comparisons at a time (%(default)s)")
    margins.add_argument("--seed", type=natural, default=0, metavar="N", help="of the draws (%(default)s)")
    margins.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    margins.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(choices)s (%(default)s)")
    margins.add_argument("--cache", type=Path, metavar="DIR", help="by default $FLOWALIGN_CACHE or ~/.cache/flowalign")


def _calibrate(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ("base", "pairs", "method", "fuse", "ties", "by", "fitted", "out", "seed")
    return runs.calibrate(options.table, **{name: getattr(options, name) for name in names})


def _select(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ("by", "out", "most", "ties", "weights", "ratio", "potential_weight", "seed")
    settings = dict(options.settings) | ({"seed": options.seed} if options.by == "random" else {})
    return runs.select(options.source, settings=settings, **{name: getattr(options, name) for name in names})


def _margins(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ("out", "draws", "batch_size", "seed", "device", "precision", "cache")
    return runs.margins(options.checkpoint, options.source, **{name: getattr(options, name) for name in names})


def _setting(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        equals = ""
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, such as least=0.2")
    return name, int(number) if number.is_integer() and name in ("top", "seed") else number
