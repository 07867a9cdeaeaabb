"""Files that lie elsewhere, by address: `s3://`, `gs://`, `https://`, `hf://`, `memory://` and all else that fsspec knows."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, TypeVar

from flowalign.errors import DataError, MissingExtraError, reason

ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Remote:
    """An address, with those methods of `pathlib.Path` that readers use. Nothing is fetched before it is asked for.

    Every method that reads raises DataError where the address cannot be read, and MissingExtraError where the package for
    its kind is not installed.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> Remote | Path:
        return Path(name) if name.startswith("/") else Remote(f"{self.address.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self._path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self._path).suffix

    @property
    def parent(self) -> Remote:
        return Remote(self.address.partition("?")[0].rstrip("/").rpartition("/")[0])

    def open(self, mode: str = "rb") -> Any:
        """A file of bytes that can seek; what is read is fetched in blocks."""
        return self._ask(lambda files, path: files.open(path, mode))

    def read_bytes(self) -> bytes:
        return self._ask(lambda files, path: bytes(files.cat_file(path)))

    def read_span(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, and no others, unless a web server knows no ranges and sends the whole file."""
        data = self._ask(lambda files, path: bytes(files.cat_file(path, start=offset, end=offset + size)))
        return data if len(data) <= size else data[offset : offset + size]

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self._ask(lambda files, path: files.size(path)))

    def exists(self) -> bool:
        return bool(self._ask(lambda files, path: files.exists(path)))

    def is_dir(self) -> bool:
        if self.suffix and self.address.startswith("http"):
            return False  # a web server is asked by fetching the file
        return bool(self._ask(lambda files, path: files.isdir(path)))

    def rglob(self, pattern: str) -> Iterator[Remote]:
        """Files under this address whose names fit `pattern`."""
        found = self._ask(lambda files, path: [files.unstrip_protocol(each) for each in files.find(path)])
        yield from (Remote(each) for each in found if PurePosixPath(each).match(pattern))

    def relative_to(self, other: Remote) -> PurePosixPath:
        return PurePosixPath(self._path).relative_to(other._path)

    @property
    def _path(self) -> str:
        return "/" + ADDRESS.sub("", self.address.partition("?")[0]).lstrip("/")

    def _ask(self, question: Callable[[Any, str], T]) -> T:
        import fsspec  # slow to import, and only addresses need it

        try:
            return question(*fsspec.core.url_to_fs(self.address))
        except ImportError as error:
            kind = self.address.partition(":")[0]
            raise MissingExtraError(f"fsspec[{kind}]", "remote", f"reading {self.address}") from error
        except Exception as error:  # each kind of storage raises its own
            said = "there is no such file" if isinstance(error, FileNotFoundError) else reason(error)
            raise DataError(
                f"cannot read {self.address!r} ({said}); check the address, the network and your credentials"
            ) from None


Place = Path | Remote


def at(source: str | Path) -> Place:
    """Where a source is: an address, or a path of this machine."""
    return Remote(str(source)) if ADDRESS.match(str(source)) else Path(source)


def whole(place: Place) -> Place:
    """The same place, named from the root: links and `..` in its folder are followed, what it ends in is left as it is."""
    return place if isinstance(place, Remote) else Path(os.path.realpath(place.parent)) / place.name


def beside(folder: Place, name: str) -> Place:
    """What a row in `folder` names: an address, or a path that may be relative to the folder."""
    return Remote(name) if ADDRESS.match(name) else folder / name


def mapped(path: Place) -> mmap.mmap:
    """The whole of a file as bytes, without holding it in memory; what lies elsewhere is copied to a temporary file once."""
    if isinstance(path, Path):
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with path.open("rb") as source, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(source, copy, 2**20)
        copy.flush()
        return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
