"""What arguments of several commands mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flowalign.errors import CheckpointError, ConfigError

Tree = TypeVar("Tree")
PRECISIONS = ("fp32", "bf16", "fp16")
Command = Callable[[str, Callable[[argparse.Namespace], dict[str, Any]], str], argparse.ArgumentParser]
"""Adds a command: its name, what it calls, what it says of itself."""


def run_settings(options: argparse.Namespace, load: Callable[[Path, Sequence[str]], Tree]) -> Tree:
    """What CONFIG, --set, --output and --resume ask for; CONFIG may be the folder of a run that goes on.

    load: reads a settings tree from a YAML file and overrides. Raises UserError.
    """
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
    settings: Any = load(path, options.overrides)
    return settings if output is None else settings.model_copy(update={"output": str(output)})


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The texts that --prompts names, the first --limit of them."""
    from flowalign.data import prompts

    return prompts.read(options.prompts, options.limit)


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling` added, but for prompts and place, as keywords of a verb."""
    names = ("steps", "guidance", "batch_size", "sampler", "precision", "device")
    return {"seeds": list(options.seeds), **{name: getattr(options, name) for name in names}}


def add_run(parser: argparse.ArgumentParser) -> None:
    """What `run_settings` reads: CONFIG, --set, --resume and --output."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; with --resume also a run folder")
    add_overrides(parser)
    parser.add_argument("--resume", action="store_true", help="continue where an earlier run of this output folder stopped")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run folder, instead of the configuration's output")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--set a.b=c."""
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="a.b=c",
        help="override a setting, value in YAML",
    )


def add_sampling(parser: argparse.ArgumentParser, out: Path, *, always: bool = True) -> None:
    """How pictures are drawn: prompts, seeds, steps and so on; out: the default folder; always: something is drawn for sure."""
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=always,
        metavar="FILE|TEXT",
        help="text, .txt (one per line) or .jsonl files with a prompt" + ("" if always else ", for sides that are drawn"),
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=seed, nargs="+", metavar="N", default=[0], help="one picture per prompt and seed (0)")
    seeds.add_argument("--seed", type=seed, nargs=1, dest="seeds", metavar="N", help="the same with one seed")
    parser.add_argument("--out", type=Path, metavar="DIR", default=out, help="where to write (%(default)s)")
    parser.add_argument("--steps", type=positive, default=25, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance", type=scale, default=5.0, help="classifier-free guidance scale (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="pictures drawn together (%(default)s)")
    parser.add_argument("--sampler", metavar="NAME", default="default", help="by default the checkpoint's own")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(choices)s (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")


def weights(text: str) -> dict[str, float]:
    """NAME=W,NAME=W: a weight of 0 or more for each objective."""
    pairs = [each.partition("=") for each in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=W,NAME=W, such as clip=0.7,style=0.3")
    return {name.strip(): scale(value) for name, _, value in pairs}


def user(text: str) -> dict[str, float]:
    """NAME, or shares of several: NAME=W,NAME=W."""
    return weights(text) if "=" in text else {text: 1.0}


def natural(text: str) -> int:
    """A whole number of 0 or more."""
    value = int(text) if text.strip().isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return value


def seed(text: str) -> int:
    """A whole number that tables and generators of random numbers can hold: 0 to 2**63 - 1."""
    if (value := natural(text)) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large for a seed: give less than {2**63}")
    return value


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if (value := natural(text)) == 0:
        raise argparse.ArgumentTypeError("0 is too few: give 1 or more")
    return value


def price(text: str) -> tuple[str, float]:
    """GPU=USD, the price of an hour."""
    name, equals, price = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not GPU=USD, such as H100=2.5")
    return name, scale(price)


def share(text: str) -> tuple[str, float]:
    """RUN=W, how much a run counts."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, float(weight)) if name else _no_share(text)
    except ValueError:
        return _no_share(text)


def _no_share(text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{text!r} is not RUN=W, such as runs/my=0.5")


def scale(text: str) -> float:
    """A finite number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
