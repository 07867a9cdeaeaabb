"""`flowalign serve` as a process of its own, for as long as something needs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowalign.errors import RunError

PATIENCE = 120.0
"""Seconds that a server has to start, and to end once it was told to."""


@contextmanager
def serving(*arguments: str, log: Path) -> Iterator[str]:
    """The address of `flowalign serve ARGUMENTS` on a free port of this machine; it ends with the block.

    log: gets what the server says. Variables FLOWALIGN_… of the environment, such as keys, are not passed on. Raises RunError
    for a server that does not start.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWALIGN_")}
    command = [sys.executable, "-m", "flowalign", "serve", "--port", "0", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """What a server says once it listens."""
    late = threading.Timer(PATIENCE, process.kill)
    late.start()
    try:
        for line in process.stdout or ():
            if (found := re.search(r"^serving .* on (http://\S+)$", line.rstrip())) is not None:
                return found[1]
    finally:
        late.cancel()
    process.wait()
    said = log.read_text(encoding="utf-8").strip().splitlines()
    why = said[-1] if said else f"exit code {process.returncode} within {PATIENCE:.0f} s"
    raise RunError(f"the server did not start ({why}); {log} holds all that it said.")
