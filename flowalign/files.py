"""Atomic writes: a reader, or a run killed at any instant, sees the old file or the new one, never a part of it.

And lines of text, as JSON lines are to be read; and whether there is a place for what is to be written.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowalign.errors import ConfigError

SUFFIX = ".tmp"
STALE = 24 * 3600.0
"""Seconds without a write after which a temporary file is a killed process's; a running one may compute for long before."""


def check_file(out: Path, what: str = "out") -> None:
    """Raises ConfigError where `out` cannot become a file: before an hour of work rather than after it. Makes nothing.

    what: what `out` is called where it comes from.
    """
    if out.is_dir():
        raise ConfigError(f"{what} is {out}, which is a folder; give a file's name.")
    _check_below(out.parent, out, what)


def check_folder(out: Path, what: str = "out") -> None:
    """The same where `out` is to become a folder, or is one."""
    if os.path.lexists(out) and not out.is_dir():
        raise ConfigError(f"{what} is {out}, which is a file; give a folder.")
    _check_below(out, out, what)


def _check_below(folder: Path, out: Path, what: str) -> None:
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    problem = 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    if problem := problem if there.is_dir() else errno.ENOTDIR:
        raise ConfigError(f"{what} is {out}, where nothing can be written ({os.strerror(problem)}); choose another place.")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, moved onto it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a whole folder; an existing one at `path` is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent))
    try:
        yield temporary
        for inner in (temporary, *temporary.rglob("*")):  # safetensors writes files that only their owner can read
            inner.chmod((0o777 if inner.is_dir() else 0o666) & ~_umask())
        if path.exists():
            # A rename cannot replace a full folder: step aside first, so that no instant shows a half-written one.
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.replace(old / "old")
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(folder: Path, pattern: str = "*") -> dict[Path, int]:
    """Bytes of the temporary files of `atomic`, for paths of this pattern in this folder, that a killed process left."""
    found = {}
    for path in folder.glob(f".{pattern}.*{SUFFIX}"):
        try:
            about = path.lstat()
        except FileNotFoundError:  # a running process is done with it
            continue
        if stat.S_ISREG(about.st_mode) and about.st_mtime < time.time() - STALE:
            found[path] = about.st_size
    return found


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends.

    Not splitlines(): it also splits at U+0085, U+2028 and U+2029, which JSON strings may hold, prompts among them.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines if lines[-1] else lines[:-1]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
