"""Commands that train, or say what training would take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import (
    Command,
    add_overrides,
    add_run,
    positive,
    price,
    run_settings,
    scale,
)
from flowalign.plan.gpus import EFFICIENCY, GPUS


def add(command: Command) -> None:
    align = command("align", _align, "Align a model on comparisons, as a YAML configuration says.")
    add_run(align)

    adapt = command("adapt", _adapt, "Take a new user into a run with users: learn one embedding from a few comparisons.")
    adapt.add_argument("run", type=Path, metavar="RUN", help="a finished run with a section users")
    adapt.add_argument("pairs", metavar="PAIRS", help="comparisons that the new user judged, four or more")
    adapt.add_argument("--user", required=True, metavar="NAME", help="what to call the new user")
    adapt.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder that knows the new user too")
    adapt.add_argument("--resume", action="store_true", help="continue where an earlier adapt into this folder stopped")
    adapt.add_argument("--steps", type=positive, default=60, metavar="N", help="optimizer steps (%(default)s)")
    adapt.add_argument("--learning-rate", type=scale, default=0.05, help="of the embedding (%(default)s)")
    add_overrides(adapt)

    plan = command("plan", _plan, "Say what a configuration would train, hold, store and cost, without weights or pictures.")
    plan.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    add_overrides(plan)
    plan.add_argument("--comparisons", type=positive, metavar="N", help="rows of data.train, where it is not on this disk")
    plan.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="processes that train together, one a GPU (%(default)s)"
    )
    plan.add_argument(
        "--efficiency", type=scale, default=EFFICIENCY, help="share of the GPU's peak that is reached (%(default)s, assumed)"
    )
    plan.add_argument(
        "--price",
        type=price,
        action="extend",
        nargs="+",
        default=[],
        metavar="GPU=USD",
        help=f"price of an hour of {' or '.join(GPUS)}, instead of the assumed one",
    )

    suggest = command("suggest-beta", _suggest_beta, "Train a throw-away copy a little and say which beta suits the data.")
    suggest.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    add_overrides(suggest)
    suggest.add_argument("--steps", type=positive, default=25, metavar="N", help="optimizer steps of the probe (%(default)s)")
    suggest.add_argument(
        "--target", type=scale, default=0.3, help="mean of the gradient factor that beta is to leave, 0 to 0.5 (%(default)s)"
    )

    objectives = command("objectives", _objectives, "List the losses to align with, what they compare and need.")
    objectives.add_argument("--markdown", type=Path, metavar="PAGE", help="write the full list between the marks of this page")


def _align(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs

    settings = run_settings(options, config.load)
    return runs.align(settings, resume=options.resume)


def _adapt(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.adapt(
        options.run,
        options.pairs,
        options.user,
        options.out,
        steps=options.steps,
        learning_rate=options.learning_rate,
        overrides=options.overrides,
        resume=options.resume,
    )


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs

    settings = config.load(options.config, options.overrides)
    return runs.plan(
        settings,
        efficiency=options.efficiency,
        prices=dict(options.price),
        comparisons=options.comparisons,
        processes=options.processes,
    )


def _suggest_beta(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs

    return runs.suggest_beta(config.load(options.config, options.overrides), steps=options.steps, target=options.target)


def _objectives(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import catalog

    return catalog.listing() if options.markdown is None else catalog.write_page(options.markdown)
