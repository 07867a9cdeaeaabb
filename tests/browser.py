"""A real browser, spoken to in the DevTools protocol over a pipe: no driver and no port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

# The browser reads commands from its file 3 and writes to its file 4; on the way there no end may overwrite the other.
PLUMBER = """
import fcntl, os, sys
for target, end in enumerate([fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]], 3):
    os.dup2(end, target)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._buffer, self._count, self._session = read, write, b"", 0, ""
        self.problems: list[str] = []
        """Exceptions of scripts, and what the page's policy refused."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, page: Path | str) -> None:
        """Open a file or an address and wait until it has loaded."""
        self._call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self.ask("new Promise(done => document.readyState === 'complete' ? done(0) : addEventListener('load', () => done(0)))")

    def ask(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key of the keyboard, down and up."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def click(self, selector: str) -> None:
        """The left button of the mouse in the middle of an element."""
        x, y = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, selector: str, start: float, end: float) -> None:
        """The left button of the mouse held from one place to another along an element, as shares of its width."""
        left, width, y = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x, r.width, r.y + r.height / 2]; })()"
        )
        held = {"y": y, "button": "left", "buttons": 1, "clickCount": 1}
        self._call("Input.dispatchMouseEvent", type="mousePressed", x=left + start * width, **held)
        for part in range(1, 9):
            self._call(
                "Input.dispatchMouseEvent", type="mouseMoved", x=left + (start + (end - start) * part / 8) * width, **held
            )
        self._call("Input.dispatchMouseEvent", type="mouseReleased", x=left + end * width, **held | {"buttons": 0})

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self._call("Input.insertText", text=text)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                data = os.read(self._read, 1 << 16)
                if not data:
                    raise RuntimeError("the browser is gone")
                self._buffer += data
            text, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(answer["params"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.problems.append(answer["params"]["entry"]["text"])
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for the block; only to be called where CHROMIUM is not None."""
    to_browser, from_browser = os.pipe(), os.pipe()
    profile = tempfile.mkdtemp()
    words = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    words += [f"--user-data-dir={profile}", "--window-size=1200,900", "--no-first-run"]
    ends = to_browser[0], from_browser[1]
    command = [sys.executable, "-c", PLUMBER, *map(str, ends), *words]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=ends, **quiet)
    for end in ends:
        os.close(end)
    try:
        yield Browser(from_browser[0], to_browser[1])
    finally:
        process.terminate()
        process.wait(30)
        for end in (to_browser[1], from_browser[0]):
            os.close(end)
        shutil.rmtree(profile, ignore_errors=True)
