"""Commands that make scores comparable and turn them into comparisons."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import PRECISIONS, Command, positive, scale, seed

METHODS = ("winrate", "temperature", "platt", "isotonic")
TIES = ("half", "rao_kupper", "davidson")
WAYS = ("mean", "sum", "min", "majority", "fused", "general")
PICKERS = ("best_worst", "margin", "frs", "intersection", "majority", "random", "rso", "steered")
ORDERS = ("explicit", "implicit", "potential")
FORMATS = ("auto", "folder", "jsonl", "parquet", "webdataset", "datasets")


def add(command: Command) -> None:
    calibrate = command("calibrate", _calibrate, "Make a table's scores comparable: win rates, and one score for all.")
    calibrate.add_argument("table", type=Path, metavar="TABLE", help="what flowalign score wrote")
    calibrate.add_argument("--base", type=Path, metavar="TABLE", help="win rates over these pictures of the same prompts")
    calibrate.add_argument("--pairs", metavar="FILE", help="labelled comparisons of pictures of the table")
    calibrate.add_argument("--method", choices=METHODS, help="%(choices)s; with --pairs temperature, without winrate")
    calibrate.add_argument("--fuse", action="store_true", help="fit a weighted combination of the rewards as well")
    calibrate.add_argument(
        "--general", metavar="scores|REWARD", help="fit a preference model that can hold cycles, on scores or a reward's tower"
    )
    calibrate.add_argument("--ties", choices=TIES, default="half", help="labels that are ties: %(choices)s (%(default)s)")
    calibrate.add_argument("--by", choices=WAYS, help="%(choices)s; by default what was fitted last, else mean")
    calibrate.add_argument("--weights", type=_weight, nargs="+", default=[], metavar="REWARD=W", help="of --by sum")
    calibrate.add_argument("--apply", type=Path, dest="fitted", metavar="JSON", help="fit nothing: an earlier calibration")
    calibrate.add_argument(
        "--out", type=Path, metavar="FILE", help="calibration .json or new table .parquet; by default TABLE-calibrated.*"
    )
    calibrate.add_argument("--seed", type=seed, default=0, metavar="N", help="of folds and intervals (%(default)s)")

    select = command("select", _select, "Pick comparisons from a score table, or the most telling ones of a file of them.")
    select.add_argument("source", metavar="SOURCE", help="a score table; comparisons for explicit, implicit, potential")
    select.add_argument("--by", choices=(*PICKERS, *ORDERS), required=True, help="%(choices)s")
    select.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .jsonl file, for data.train")
    select.add_argument("--score", metavar="NAME", help="combined (the default), raw (their plain sum) or one reward")
    select.add_argument("--most", type=positive, metavar="N", help="pairs of a prompt (best_worst, random: 1)")
    select.add_argument("--least", type=scale, metavar="GAP", help="smallest gap of the score (margin: 0.1)")
    select.add_argument("--ties", choices=("drop", "keep"), help="equal scores: %(choices)s (drop)")
    select.add_argument("--tie-width", type=scale, metavar="GAP", help="gap up to which scores are equal (0)")
    select.add_argument("--weights", choices=("even", "histogram"), default="even", help="%(choices)s (%(default)s)")
    select.add_argument("--ratio", type=scale, metavar="SHARE", help="of the comparisons, the most telling (0.4 where ordered)")
    select.add_argument("--potential-weight", type=scale, metavar="W", help="w of the potential (1)")
    select.add_argument("--objectives", nargs="+", default=[], metavar="REWARD", help="steered: rewards to weigh (all)")
    select.add_argument("--alpha", type=scale, help="steered: weights are Dirichlet of so much each (1)")
    select.add_argument("--draws", type=positive, metavar="N", help="steered: weights a prompt (4)")
    select.add_argument("--plan", type=Path, metavar="FILE", help="steered: weights as drawn by, a plan.jsonl of improve")
    select.add_argument("--temperature", type=scale, metavar="B", help="of rso, in the score's unit (0.5)")
    select.add_argument("--labels", choices=("votes", "rates", "mixture"), help="%(choices)s (votes)")
    select.add_argument("--seed", type=seed, default=0, metavar="N", help="of random, rso and steered (%(default)s)")

    margins = command("margins", _margins, "Add to comparisons by how much a model prefers the chosen picture already.")
    margins.add_argument("checkpoint", metavar="MODEL", help="a checkpoint, or a run folder")
    margins.add_argument("pairs", metavar="PAIRS", help="comparisons, in any form that align reads")
    margins.add_argument(
        "--draws", type=positive, default=32, metavar="N", help="times and noises that all share (%(default)s)"
    )
    margins.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a .jsonl file with the column implicit_margin"
    )
    margins.add_argument("--seed", type=seed, default=0, metavar="N", help="of the draws (%(default)s)")
    margins.add_argument("--resolution", type=positive, metavar="PX", help="by default the checkpoint's own")
    margins.add_argument("--batch-size", type=positive, default=8, metavar="N", help="comparisons at a time (%(default)s)")
    margins.add_argument("--limit", type=positive, metavar="N", help="only the first N comparisons")
    margins.add_argument("--format", choices=FORMATS, default="auto", help="%(choices)s (%(default)s)")
    margins.add_argument("--split", default="train", metavar="NAME", help="of a data set or of named shards (%(default)s)")
    margins.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(choices)s (%(default)s)")
    margins.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    margins.add_argument("--cache", type=Path, metavar="DIR", help="by default $FLOWALIGN_CACHE or ~/.cache/flowalign")


def _calibrate(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ("base", "pairs", "method", "fuse", "general", "ties", "by", "fitted", "out", "seed")
    found = {name: getattr(options, name) for name in names}
    return runs.calibrate(options.table, **found, weights=dict(options.weights))


def _select(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ("by", "out", "score", "most", "least", "ties", "tie_width", "weights", "ratio", "potential_weight")
    own = ("objectives", "alpha", "draws", "plan", "temperature", "labels", "seed")
    return runs.select(options.source, **{name: getattr(options, name) for name in (*names, *own)})


def _margins(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ("out", "draws", "seed", "resolution", "batch_size", "limit", "format", "split", "precision", "device", "cache")
    return runs.margins(options.checkpoint, options.pairs, **{name: getattr(options, name) for name in names})


def _weight(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not REWARD=W, such as clip=0.5")
    return name, scale(value)
