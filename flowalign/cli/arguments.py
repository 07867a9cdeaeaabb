"""What arguments of several commands mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16")
Command = Callable[[str, Callable[[argparse.Namespace], dict[str, Any]], str], argparse.ArgumentParser]
"""Adds a command: its name, what it calls, what it says of itself."""


def read_prompts(options: argparse.Namespace) -> list[str]:
    from flowalign.data import prompts

    return prompts.read(options.prompts, options.limit)


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "guidance", "batch_size", "sampler", "precision", "device")
    return {"seeds": list(options.seeds), **{name: getattr(options, name) for name in names}}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="a.b=c",
        help="override a setting, value in YAML",
    )


def add_sampling(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE|TEXT",
        help="text, .txt (one per line) or .jsonl files with a prompt",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=natural, nargs="+", metavar="N", default=[0], help="one picture per prompt and seed (0)")
    seeds.add_argument("--seed", type=natural, nargs=1, dest="seeds", metavar="N", help="the same with one seed")
    parser.add_argument("--out", type=Path, metavar="DIR", default=out, help="where to write (%(default)s)")
    parser.add_argument("--steps", type=positive, default=25, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance", type=scale, default=5.0, help="classifier-free guidance scale (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="pictures drawn together (%(default)s)")
    parser.add_argument("--sampler", metavar="NAME", default="default", help="by default the checkpoint's own")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(choices)s (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")


def natural(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return value


def positive(text: str) -> int:
    if (value := natural(text)) == 0:
        raise argparse.ArgumentTypeError("0 is too few: give 1 or more")
    return value


def price(text: str) -> tuple[str, float]:
    name, equals, price = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not GPU=USD, such as H100=2.5")
    return name, scale(price)


def scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
