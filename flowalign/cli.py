"""The command line: parse, call one function of `runs`, demo or catalog, print. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowalign import __version__
from flowalign.errors import CheckpointError, ConfigError, FlowalignError
from flowalign.plan.gpus import EFFICIENCY, GPUS

PRECISIONS = ("fp32", "bf16", "fp16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` defaults to the process's arguments) and return its exit code.

    With --json the last line of standard output is the command's result, or {"error": {...}}, and everything meant for
    people goes to standard error. Raises SystemExit(2) for arguments that cannot be parsed, as argparse does.
    """
    options = _parser().parse_args(_dashes(sys.argv[1:] if argv is None else argv))
    try:
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            result = options.command(options)
            if result["summary"] is None:  # another process of the same run speaks for this one
                return 0
            print(result["summary"])
    except FlowalignError as error:
        return _fail(options, error, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(options, error, "interrupted", 1)
    except Exception as error:  # the last resort: whatever it is, a user sees one sentence
        if options.debug:
            raise
        said = " ".join(str(error).split())
        return _fail(options, error, f"{type(error).__name__}: {said} (unexpected; add --debug for the traceback)", 1)
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


def _fail(options: argparse.Namespace, error: BaseException, message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if options.json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": message}}, ensure_ascii=False))
    return code


def _dashes(argv: Sequence[str]) -> list[str]:
    """--batch_size is --batch-size; values, and all after a bare --, stay as they are."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    out = []
    for argument in argv[:end]:
        name, equals, value = argument.partition("=")
        out.append(name.replace("_", "-") + equals + value if argument.startswith("--") else argument)
    return [*out, *argv[end:]]


def _align(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs

    path: Path = options.config
    output = options.output
    if path.is_dir():
        if not options.resume:
            raise ConfigError(f"{path} is a folder; add --resume to continue the run in it, or give a YAML configuration.")
        if output is not None:
            raise ConfigError(f"--output {output} cannot be given to continue {path}: a run continues in its own folder.")
        output, path = path, path / "config.yaml"
        if not path.is_file():
            raise CheckpointError(f"{output} is not a run folder: it holds no config.yaml; give the folder of an earlier run.")
    settings = config.load(path, options.overrides)
    if output is not None:
        settings = settings.model_copy(update={"output": str(output)})
    return runs.align(settings, resume=options.resume)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs

    settings = config.load(options.config, options.overrides)
    return runs.plan(settings, efficiency=options.efficiency, prices=dict(options.price), comparisons=options.comparisons)


def _suggest_beta(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import config, runs

    return runs.suggest_beta(config.load(options.config, options.overrides), steps=options.steps, target=options.target)


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.generate(options.checkpoint, _prompts(options), out=options.out, **_sampling(options))


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.evaluate(
        options.base, options.aligned, _prompts(options), judges=options.judges, out=options.out, **_sampling(options)
    )


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.report(options.run)


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    return runs.export_kohya(options.run, options.out)


def _cache(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    if options.action == "clear":
        return runs.cache_clear(options.folder, options.fingerprint)
    if options.fingerprint is not None:
        raise ConfigError(f"--fingerprint {options.fingerprint} only goes with clear: flowalign cache clear --fingerprint F.")
    return runs.cache_list(options.folder)


def _objectives(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import catalog

    return catalog.listing() if options.markdown is None else catalog.write_page(options.markdown)


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign.demo import demo

    return demo(options.out)


def _prompts(options: argparse.Namespace) -> list[str]:
    from flowalign.data import prompts

    return prompts.read(options.prompts, options.limit)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "guidance", "batch_size", "sampler", "precision", "device")
    return {"seeds": list(options.seeds), **{name: getattr(options, name) for name in names}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flowalign", description="Align Stable Diffusion on preference pairs.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"flowalign {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--json", action="store_true", help="print the result as one line of JSON, the rest to stderr")
    everywhere.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[everywhere], allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    align = command("align", _align, "Align a model on comparisons, as a YAML configuration says.")
    align.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; with --resume also a run folder")
    _add_overrides(align)
    align.add_argument("--resume", action="store_true", help="continue where an earlier run of this output folder stopped")
    align.add_argument("--output", type=Path, metavar="DIR", help="the run folder, instead of the configuration's output")

    plan = command("plan", _plan, "Say what a configuration would train, hold, store and cost, without weights or pictures.")
    plan.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    _add_overrides(plan)
    plan.add_argument("--comparisons", type=_positive, metavar="N", help="rows of data.train, where it is not on this disk")
    plan.add_argument(
        "--efficiency", type=_scale, default=EFFICIENCY, help="share of the GPU's peak that is reached (%(default)s, assumed)"
    )
    plan.add_argument(
        "--price",
        type=_price,
        action="extend",
        nargs="+",
        default=[],
        metavar="GPU=USD",
        help=f"price of an hour of {' or '.join(GPUS)}, instead of the assumed one",
    )

    suggest = command("suggest-beta", _suggest_beta, "Train a throw-away copy a little and say which beta suits the data.")
    suggest.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    _add_overrides(suggest)
    suggest.add_argument("--steps", type=_positive, default=25, metavar="N", help="optimizer steps of the probe (%(default)s)")
    suggest.add_argument(
        "--target", type=_scale, default=0.3, help="mean of the gradient factor that beta is to leave, 0 to 0.5 (%(default)s)"
    )

    generate = command("generate", _generate, "Draw pictures from a checkpoint or an aligned run.")
    generate.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN", help="a diffusers folder, a hub id or a run folder")
    _add_sampling(generate, Path("runs/generate"))

    evaluate = command("evaluate", _evaluate, "Compare two models picture by picture: win rates with intervals.")
    for name in ("base", "aligned"):
        evaluate.add_argument(name, metavar=name.upper(), help="a checkpoint, a run folder or a folder that generate wrote")
    evaluate.add_argument("--judges", type=Path, metavar="DIR", help="folder of judges; by default those of the run")
    _add_sampling(evaluate, Path("runs/evaluate"))

    report = command("report", _report, "Write the report page of a run again.")
    report.add_argument("run", type=Path, metavar="RUN", help="a run folder")

    export = command("export", _export, "Write a run's LoRA as one file in kohya's format, for A1111 and ComfyUI.")
    export.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished LoRA run")
    export.add_argument("--out", type=Path, metavar="FILE", help="by default weights/kohya.safetensors in the run")

    cache = command("cache", _cache, "List or clear the encoded pictures and prompts.")
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    cache.add_argument("--fingerprint", metavar="F", help="clear only what the encoder with this fingerprint made")
    cache.add_argument("--folder", type=Path, metavar="DIR", help="by default $FLOWALIGN_CACHE or ~/.cache/flowalign")

    objectives = command("objectives", _objectives, "List the losses to align with, what they compare and need.")
    objectives.add_argument("--markdown", type=Path, metavar="PAGE", help="write the full list between the marks of this page")

    demo = command("demo", _demo, "Align the bundled tiny model on the bundled pictures and show what changed.")
    demo.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/demo"), help="the run folder (%(default)s)")
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="a.b=c",
        help="override a setting, value in YAML",
    )


def _add_sampling(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE|TEXT",
        help="text, .txt (one per line) or .jsonl files with a prompt",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N prompts")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds", type=_natural, nargs="+", metavar="N", default=[0], help="one picture per prompt and seed (0)"
    )
    seeds.add_argument("--seed", type=_natural, nargs=1, dest="seeds", metavar="N", help="the same with one seed")
    parser.add_argument("--out", type=Path, metavar="DIR", default=out, help="where to write (%(default)s)")
    parser.add_argument("--steps", type=_positive, default=25, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance", type=_scale, default=5.0, help="classifier-free guidance scale (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="pictures drawn together (%(default)s)")
    parser.add_argument("--sampler", metavar="NAME", default="default", help="by default the checkpoint's own")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(choices)s (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")


def _natural(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return value


def _positive(text: str) -> int:
    if (value := _natural(text)) == 0:
        raise argparse.ArgumentTypeError("0 is too few: give 1 or more")
    return value


def _price(text: str) -> tuple[str, float]:
    name, equals, price = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not GPU=USD, such as H100=2.5")
    return name, _scale(price)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
