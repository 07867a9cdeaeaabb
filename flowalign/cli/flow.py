"""Commands of preference flows: `flow fit`, `flow apply`, `flow evaluate`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from flowalign.cli.arguments import Command, add_run, positive, run_settings, scale
from flowalign.errors import ConfigError

SOLVERS = ("euler", "midpoint", "heun2", "rk4", "dopri5")


def add(command: Command) -> None:
    flow = command("flow", _missing, "Fit a flow from rejected to chosen pictures, and put it behind any generator.")
    verbs = flow.add_subparsers(title="what to do", metavar="VERB", required=True)

    def verb(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        # Not set again where it was given before the verb: the parent's value would be lost to this parser's default.
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as one line of JSON")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        sub.set_defaults(command=function)
        return sub

    fit = verb("fit", _fit, "Fit a flow to comparisons or to a score table, as a YAML configuration says.")
    add_run(fit)

    apply = verb("apply", _apply, "Move the pictures of a folder along a flow.")
    _add_source(apply)
    apply.add_argument("--out", type=Path, metavar="DIR", required=True, help="where to write")
    apply.add_argument("--batch-size", type=positive, metavar="N", help="pictures moved together")
    apply.add_argument("--diagnose", action="store_true", help="also measure the error of the steps, by going back")

    evaluate = verb("evaluate", _evaluate, "Compare pictures before and after a flow: win rates, identity, cost.")
    _add_source(evaluate)
    evaluate.add_argument("--judges", type=Path, metavar="DIR", help="folder of judges; by default those of the run")
    evaluate.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/flow-evaluate"), help="(%(default)s)")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a finished flow run")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a folder of pictures, such as generate writes")
    parser.add_argument("--prompt", metavar="TEXT", help="what pictures show that no metadata.jsonl describes")
    parser.add_argument("--strength", type=scale, metavar="S", help="how far to move, 0 to 1; these are by default the run's")
    parser.add_argument("--steps", type=positive, metavar="N", help="steps of the solver")
    parser.add_argument("--solver", choices=SOLVERS, help="%(choices)s")
    parser.add_argument("--iterations", type=positive, metavar="N", help="how often the flow is applied")
    parser.add_argument("--guidance", type=scale, metavar="G", help="scale of guidance by the prompt; 1 is none")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")


def solving(options: argparse.Namespace) -> dict[str, Any]:
    """How a flow is applied; None where the run decides."""
    names = ("solver", "steps", "strength", "iterations", "guidance", "prompt", "device")
    return {name: getattr(options, name) for name in names}


def _missing(options: argparse.Namespace) -> dict[str, Any]:
    raise ConfigError("say what to do: flowalign flow fit, apply or evaluate.")


def _fit(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs
    from flowalign.flow.settings import FlowConfig

    settings = run_settings(options, partial(config.load_tree, FlowConfig))
    return runs.fit_flow(settings, resume=options.resume)


def _apply(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.apply_flow(
        options.run,
        options.source,
        out=options.out,
        batch_size=options.batch_size,
        diagnose=options.diagnose,
        **solving(options),
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.evaluate_flow(options.run, options.source, judges=options.judges, out=options.out, **solving(options))
