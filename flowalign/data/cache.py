"""The latent and conditioning cache on disk: every picture and every prompt is encoded once, whatever is trained on it.

    CACHE/images-<encoder>-<resolution>-<dtype>/about.json, ab/abcd....safetensors    mean, logvar  [C, h, w]; geometry [6]
                                                                                  and what is attached: mask, noise
    CACHE/prompts-<encoder>/about.json,                     ab/abcd....safetensors    conditioning  [...]

An entry's name is a hash of what it was made from, and entries appear by a rename, so several processes may fill one
cache and a killed one leaves at worst a temporary file that nobody reads.

Reference banks (`align/bank.py`) and indices of sources (`index.py`) lie beside them; `usage` and `clear` know them too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flowalign.errors import DataError, allowed
from flowalign.files import atomic, leftovers

INDEX = "rows-{}.safetensors"
"""Name of the index of a source, see `index.py`."""
BANK = "bank-{}"
"""Name of the folder of a reference bank, by a hash of 20 digits of what it depends on."""
ENTRIES = {"images": "??/*.safetensors", "prompts": "??/*.safetensors", "bank": "draw-*.safetensors"}
"""Kinds of stores, and which files in one are its entries."""
ABOUT = "about.json"
"""What a store says of itself, written when it was last opened."""
CUT = "centre-lanczos, with geometry"
"""Name of the rule in images.fit; another rule must have another name, because it makes other entries."""
DTYPES = ("float32", "float16", "bfloat16")


class LatentCache:
    """Latents and conditioning of one checkpoint's encoders at one resolution."""

    def __init__(
        self,
        folder: str | Path,
        image_fingerprint: str,
        prompt_fingerprint: str,
        *,
        resolution: int,
        dtype: str = "float32",
        checkpoint: str = "",
    ) -> None:
        """image_fingerprint, prompt_fingerprint: `Family.fingerprint("images")` and `("prompts")`.
        resolution: side in pixels. dtype: one of DTYPES, in which latents are stored; conditioning is stored as it came.
        checkpoint: a name for people, shown by `usage`. Raises DataError for an unknown dtype.
        """
        if dtype not in DTYPES:
            raise DataError(f"the cache's dtype is {dtype!r}; {allowed(dtype, DTYPES)}")
        self.folder, self.resolution, self.dtype = Path(folder), resolution, getattr(torch, dtype)
        self._image_parts = (image_fingerprint, CUT, str(resolution), dtype)
        self._prompt_parts = (prompt_fingerprint,)
        self._images = self.folder / f"images-{_short(image_fingerprint)}-{resolution}-{dtype}"
        self._prompts = self.folder / f"prompts-{_short(prompt_fingerprint)}"
        about = {"checkpoint": checkpoint, "resolution": resolution, "dtype": dtype}
        describe(self._images, {"kind": "images", "fingerprint": image_fingerprint} | about)
        describe(self._prompts, {"kind": "prompts", "fingerprint": prompt_fingerprint, "checkpoint": checkpoint})

    def image_path(self, digest: bytes, flip: bool) -> Path:
        """Where the latents of the picture with this sha256, mirrored or not, are or will be."""
        return _entry(self._images, digest.hex(), "flipped" if flip else "upright", *self._image_parts)

    def prompt_path(self, prompt: str) -> Path:
        return _entry(self._prompts, prompt, *self._prompt_parts)

    @property
    def identity(self) -> tuple[str, ...]:
        """What its entries depend on besides pictures and prompts."""
        return (*self._image_parts, *self._prompt_parts)

    def holds(self, pictures: np.ndarray, flips: Sequence[bool], prompts: Sequence[str]) -> bool:
        """Whether all these pictures, `[..., 32]` uint8 sha256, in all these variants, and prompts have entries."""
        unique, _ = distinct(pictures)
        paths = (self.image_path(digest.tobytes(), flip) for digest in unique for flip in flips)
        return all(path.exists() for path in paths) and all(self.prompt_path(prompt).exists() for prompt in ("", *prompts))

    def write_image(
        self, path: Path, mean: Tensor, std: Tensor, geometry: Sequence[int], attached: Mapping[str, Tensor] | None = None
    ) -> None:
        """Latents `[C, h, w]`, `images.geometry`, and `Attached.tensors`.

        A standard deviation of 0 becomes a log-variance of minus infinity and comes back as 0.
        """
        logvar = 2 * std.float().log()
        latents = {"mean": mean.to(self.dtype), "logvar": logvar.to(self.dtype)}
        _write(path, {**latents, "geometry": torch.tensor(geometry, dtype=torch.int32), **(attached or {})})

    def read_image(self, path: Path) -> dict[str, Tensor]:
        """`mean` and `std` `[C, h, w]`, `geometry` `[6]`, then what is attached, float32. Raises DataError if it is damaged."""
        tensors = {name: tensor.float() for name, tensor in _read(path).items()}
        mean, std, geometry = tensors.pop("mean"), (tensors.pop("logvar") / 2).exp(), tensors.pop("geometry")
        return {"mean": mean, "std": std, "geometry": geometry, **tensors}

    def write_prompt(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        _write(path, tensors)

    def read_prompt(self, path: Path) -> dict[str, Tensor]:
        """Conditioning of one prompt, unbatched. Raises DataError if the entry is missing or damaged."""
        return _read(path)


def distinct(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[..., 32]` uint8 -> the distinct ones `[m, 32]`, and for each which of them it is, `[...]` int64.

    Sorted by their first 8 bytes, which takes a tenth of the time; two pictures that share them might be listed twice.
    """
    rows = np.ascontiguousarray(pictures).reshape(-1, 32)
    order = np.argsort(rows[:, :8].copy().view("u8")[:, 0], kind="stable")
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (rows[order[1:]] != rows[order[:-1]]).any(1)
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.cumsum(new) - 1
    return rows[order[new]], place.reshape(pictures.shape[:-1])


def describe(store: Path, about: Mapping[str, Any]) -> None:
    """Say for people what a store is, unless it is said already, and that it was used now. Raises OSError."""
    path = store / ABOUT
    if path.exists():
        with suppress(OSError):  # a store that may only be read can be used all the same
            os.utime(path)
    else:
        _replace(path, (json.dumps(about, indent=2) + "\n").encode())


def usage(folder: str | Path) -> dict[str, Any]:
    """`{"entries", "bytes", "stores", "indices": {"entries", "bytes"}, "leftovers": {"entries", "bytes"}}`.

    Of each store `{"store", "entries", "bytes", "used", "kind", "fingerprint", "checkpoint", ...}`; `used` is when it was last
    opened or written. Leftovers are temporary files of killed processes; `bytes` counts all, `entries` those of stores.
    """
    stores = [store.usage() for store in _stores(folder)]
    others = {"indices": _indices(folder), "leftovers": _leftovers(folder)}
    rest = {name: {"entries": len(sizes), "bytes": sum(sizes.values())} for name, sizes in others.items()}
    size = sum(each["bytes"] for each in (*stores, *rest.values()))
    return {"entries": sum(store["entries"] for store in stores), "bytes": size, "stores": stores, **rest}


def clear(folder: str | Path, fingerprint: str | None = None, kind: str | None = None) -> int:
    """Delete the entries of one store, kind or encoder, or of all, and leftovers of killed processes -> bytes freed.

    fingerprint: an encoder's, a bank's or its denoiser's, or the name of a store's folder. kind: one of ENTRIES. Indices go
    with pictures or prompts, of which they speak. Other files in the folder are not touched, nor temporary files that a
    running process may be writing. Raises DataError if the cache holds nothing of this fingerprint and kind.
    """
    if kind is not None and kind not in ENTRIES:
        raise DataError(f"the cache has no kind {kind!r}; {allowed(kind, ENTRIES)}")
    stores = [store for store in _stores(folder) if kind in (None, store.kind)]
    if fingerprint is not None:
        known = {name for store in stores for name in store.names}
        if fingerprint not in known:
            hint = allowed(fingerprint, known) if known else "flowalign cache lists what it holds"
            raise DataError(f"the cache {str(folder)!r} holds {f'no {kind}' if kind else 'nothing'} of {fingerprint!r}; {hint}")
        stores = [store for store in stores if fingerprint in store.names]
    freed = sum(map(_delete, _leftovers(folder)))
    if kind != "bank" and (fingerprint is None or any(store.kind != "bank" for store in stores)):
        freed += sum(map(_delete, _indices(folder)))
    return freed + sum(store.clear() for store in stores)


@dataclass(frozen=True)
class _Store:
    """A folder of entries of one kind."""

    path: Path
    about: Mapping[str, Any]
    """With `kind` and `fingerprint`, and whatever else `describe` was told."""

    @property
    def kind(self) -> str:
        return str(self.about["kind"])

    @property
    def names(self) -> set[str]:
        """What a user may call it."""
        return {self.path.name, *(self.about[name] for name in ("fingerprint", "denoiser") if name in self.about)}

    def usage(self) -> dict[str, Any]:
        found = [path.stat() for path in self.path.glob(ENTRIES[self.kind])]
        dates = [path.stat().st_mtime for path in (self.path / ABOUT, self.path) if path.exists()][:1]
        used = datetime.fromtimestamp(max([each.st_mtime for each in found] + dates), UTC).isoformat(timespec="seconds")
        size = sum(each.st_size for each in found)
        return {"store": self.path.name, "entries": len(found), "bytes": size, "used": used} | dict(self.about)

    def clear(self) -> int:
        freed = sum(map(_delete, list(self.path.glob(ENTRIES[self.kind]))))
        for inner in list(self.path.iterdir()):
            _remove_empty(inner)
        if [path.name for path in self.path.iterdir()] == [ABOUT]:  # else it says what the rest belongs to
            freed += _delete(self.path / ABOUT)
        _remove_empty(self.path)
        return freed


def _stores(folder: str | Path) -> Iterator[_Store]:
    for path in sorted(Path(folder).glob("*/")):
        about = _about(path)
        if re.fullmatch(BANK.format("[0-9a-f]{20}"), path.name):  # those of earlier versions do not describe themselves
            own = {"kind": "bank", "fingerprint": path.name.removeprefix(BANK.format(""))}
            yield _Store(path, {**own, "checkpoint": "", **about, **own})
        elif about.get("kind") in ("images", "prompts") and "fingerprint" in about:
            yield _Store(path, about)


def _about(store: Path) -> dict[str, Any]:
    """What a store says of itself, nothing where it does not."""
    try:
        about = json.loads((store / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _indices(folder: str | Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in Path(folder).glob(INDEX.format("*"))}


def _leftovers(folder: str | Path) -> dict[Path, int]:
    """Of killed processes, in all stores and of indices; other files there are not ours."""
    found = leftovers(Path(folder), INDEX.format("*"))
    for store in _stores(folder):
        for inner in (store.path, *store.path.glob("??/")):
            found |= leftovers(inner)
    return found


def _delete(path: Path) -> int:
    """Its bytes; 0 where another process was quicker."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # a file, or not empty
        folder.rmdir()


def _entry(store: Path, *parts: str) -> Path:
    name = hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
    return Path(f"{store}/{name[:2]}/{name}.safetensors")  # by far quicker than joining, and this runs for every picture


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    _replace(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cache entry {str(path)!r} is missing or damaged ({error}); delete it and run again") from None


def _replace(path: Path, data: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def _short(fingerprint: str) -> str:
    """The fingerprint as part of a folder name."""
    if re.fullmatch(r"[0-9A-Za-z]{1,16}", fingerprint):
        return fingerprint
    return hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
