"""`flowalign serve` as a process of its own, for as long as something needs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowalign.errors import RunError

PATIENCE = 120.0
"""Seconds that a server has to start, and to end once it was told to."""


@dataclass(frozen=True)
class Child:
    """A server that this process started, and with which it ends."""

    process: subprocess.Popen[str]
    log: Path
    """What it says to people."""
    address: str

    def end(self) -> tuple[int, str]:
        """Tell it to end, and if it does not, kill it; its exit code and the result that it printed, as JSON."""
        return _ended(self.process)


def start(*arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> Child:
    """Run `flowalign serve ARGUMENTS` on a free port of this machine.

    log: gets what the server says. environment: variables of its own; of this process's, none named FLOWALIGN_…, such as keys,
    is passed on. Raises RunError for a server that does not start.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith("FLOWALIGN_")} | dict(environment or {})
    where = ["--port", "0", "--parent", str(os.getpid()), "--json"]  # with --json all but the result goes to the log
    command = [sys.executable, "-m", "flowalign", "serve", *where, *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=own)
    try:
        return Child(process, log, _address(process, log))
    except BaseException:
        _ended(process)
        raise


@contextmanager
def serving(*arguments: str, log: Path) -> Iterator[str]:
    """The address of such a server, which ends with the block."""
    child = start(*arguments, log=log)
    try:
        yield child.address
    finally:
        child.end()


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.terminate()
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    return process.returncode, said


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """What a server says once it listens."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        over = process.poll() is not None
        said = log.read_text(encoding="utf-8")
        if (found := re.search(r"^serving .* on (http://\S+)$", said, re.MULTILINE)) is not None:
            return found[1]
        if over:
            break
        time.sleep(0.05)
    lines = said.strip().splitlines()
    why = lines[-1] if lines else f"exit code {process.returncode} within {PATIENCE:.0f} s"
    raise RunError(f"the server did not start ({why}); {log} holds all that it said.")
