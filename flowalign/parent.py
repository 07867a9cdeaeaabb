"""A process that ends with the one that started it."""

from __future__ import annotations

import os
import signal
import threading
import time

OFTEN = 0.5
"""Seconds between two looks."""


def end_with(parent: int) -> None:
    """Send this process SIGTERM as soon as the process `parent` is not its parent, which is when that one has ended.

    One that was killed tells nobody, so it has to be looked after.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(OFTEN)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
