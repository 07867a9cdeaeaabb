"""Commands that draw pictures, compare them, and show them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import (
    Command,
    add_sampling,
    read_prompts,
    sampling,
    scale,
    share,
    user,
    weights,
)
from flowalign.errors import ConfigError

DEMOS = {"align": "runs/demo", "flow": "runs/demo-flow"}
"""What can be shown, and where it is written."""


def add(command: Command) -> None:
    generate = command("generate", _generate, "Draw pictures from a checkpoint or an aligned run.")
    generate.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT_OR_RUN", help="a diffusers folder, a hub id or a run folder"
    )
    add_sampling(generate, Path("runs/generate"))
    generate.add_argument("--weights", type=weights, metavar="NAME=W,...", help="of a steered run's objectives, in any scale")
    generate.add_argument("--targets", type=weights, metavar="NAME=S,...", help="scores to draw for, of a run told scores")
    generate.add_argument("--user", type=user, metavar="NAME", help="of a run with users, or shares of several: ann=1,bob=1")
    generate.add_argument("--flow", metavar="RUN", help="move what is drawn along the flow of this run folder")
    generate.add_argument(
        "--mix",
        type=share,
        nargs="+",
        metavar="RUN=W",
        help="instead of one checkpoint: several, and their shares in what is predicted",
    )
    generate.add_argument("--negative", metavar="RUN", help="move away from this run, such as one of reversed preferences")
    generate.add_argument(
        "--negative-strength",
        type=scale,
        metavar="S",
        help="how much of it stands for the negative prompt (1)",
    )

    evaluate = command("evaluate", _evaluate, "Compare two models picture by picture: win rates with intervals.")
    for name in ("base", "aligned"):
        evaluate.add_argument(name, metavar=name.upper(), help="a checkpoint, a run folder or a folder that generate wrote")
    evaluate.add_argument("--judges", type=Path, metavar="DIR", help="folder of judges; by default those of the run")
    add_sampling(evaluate, Path("runs/evaluate"), always=False)

    report = command("report", _report, "Write the report page of a run again.")
    report.add_argument("run", type=Path, metavar="RUN", help="a run folder")

    demo = command("demo", _demo, "Show on the bundled pictures what alignment, or a flow behind a generator, changes.")
    demo.add_argument(
        "what",
        nargs="?",
        choices=tuple(DEMOS),
        default="align",
        help="align the bundled tiny model (%(default)s), or put a flow behind it and hold that against best-of-n",
    )
    shown = ", ".join(f"{folder} for {name}" for name, folder in DEMOS.items())
    demo.add_argument("--out", type=Path, metavar="DIR", help=f"where to write; replaces an earlier demo there ({shown})")


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    drawing = sampling(options)
    given = {"out": options.out, "weights": options.weights, "flow": options.flow}
    given |= {name: value for name in ("targets", "user") if (value := getattr(options, name)) is not None}
    if options.mix:
        given["mix"] = dict(options.mix)
    if options.negative is not None:
        given |= {"negative": options.negative, "negative_strength": 1.0 if (s := options.negative_strength) is None else s}
    elif options.negative_strength is not None:
        raise ConfigError(f"--negative-strength {options.negative_strength:g} says how much --negative RUN counts; give one.")
    return runs.generate(options.checkpoint, read_prompts(options), **given, **drawing)


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    if options.prompts is None and options.limit is not None:
        raise ConfigError(f"--limit {options.limit} says how many of --prompts are drawn; give them, or leave it out.")
    prompts = [] if options.prompts is None else read_prompts(options)
    return runs.evaluate(options.base, options.aligned, prompts, judges=options.judges, out=options.out, **sampling(options))


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.report(options.run)


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    out = options.out or Path(DEMOS[options.what])
    if options.what == "flow":
        from flowalign.demo_flow import demo_flow

        return demo_flow(out)
    from flowalign.demo import demo

    return demo(out)
