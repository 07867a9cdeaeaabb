"""The command line: parse, call one function of `runs`, demo or catalog, print. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from flowalign import __version__
from flowalign.cli import audit, files, flow, improve, merging, pictures, rewards, scoring, selection, serve, training
from flowalign.errors import FlowalignError
from flowalign.heap import keep_freed_memory


class UsageError(Exception):
    """Arguments that cannot be parsed; `str()` of it says why, `usage` what a command takes."""

    def __init__(self, usage: str, message: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    """Leaves it to `main` to say what cannot be parsed: to people, and to machines as well."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(self.format_usage(), message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` defaults to the process's arguments) and return its exit code.

    With --json the last line of standard output is the command's result, or {"error": {...}}, and everything meant for
    people goes to standard error. Raises SystemExit(2) for arguments that cannot be parsed, as argparse does.
    """
    given = _dashes(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(given)
    except UsageError as error:
        print(f"{error.usage}error: {error}", file=sys.stderr)
        if "--json" in given:
            _tell_machines(error, str(error))
        raise SystemExit(2) from None
    keep_freed_memory()
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
        _tell_machines(error, message)
    return code


def _tell_machines(error: BaseException, message: str) -> None:
    print(json.dumps({"error": {"type": type(error).__name__, "message": message}}, ensure_ascii=False))


def _dashes(argv: Sequence[str]) -> list[str]:
    """--batch_size is --batch-size; values, and all after a bare --, stay as they are."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    out = []
    for argument in argv[:end]:
        name, equals, value = argument.partition("=")
        out.append(name.replace("_", "-") + equals + value if argument.startswith("--") else argument)
    return [*out, *argv[end:]]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("flowalign", description="Align Stable Diffusion on preference pairs.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"flowalign {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    everywhere = _Parser(add_help=False)
    everywhere.add_argument("--json", action="store_true", help="print the result as one line of JSON, the rest to stderr")
    everywhere.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[everywhere], allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    for group in (training, improve, flow, merging, pictures, scoring, rewards, selection, audit, serve, files):
        group.add(command)
    return parser
