"""The latent and conditioning cache on disk: every picture and every prompt is encoded once, whatever is trained on it.

    CACHE/images-<encoder>-<resolution>-<dtype>/about.json, ab/abcd....safetensors    mean, logvar  [C, h, w]; geometry [6]
                                                                                  and what is attached: mask, noise
    CACHE/prompts-<encoder>/about.json,                     ab/abcd....safetensors    conditioning  [...]

An entry's name is a hash of what it was made from, and entries appear by a rename, so several processes may fill one
cache and a killed one leaves at worst a temporary file that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flowalign.errors import DataError, allowed
from flowalign.files import atomic

INDEX = "rows-{}.safetensors"
"""Name of the index of a source, see `index.py`."""
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
        _describe(self._images, {"kind": "images", "fingerprint": image_fingerprint} | about)
        _describe(self._prompts, {"kind": "prompts", "fingerprint": prompt_fingerprint, "checkpoint": checkpoint})

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


def usage(folder: str | Path) -> dict[str, Any]:
    """`{"entries", "bytes", "stores": [{"store", "entries", "bytes", "kind", "fingerprint", "checkpoint", ...}]}`."""
    stores = []
    for about, store in _stores(folder):
        sizes = [path.stat().st_size for path in store.glob("??/*.safetensors")]
        stores.append({"store": store.name, "entries": len(sizes), "bytes": sum(sizes)} | about)
    return {"entries": sum(s["entries"] for s in stores), "bytes": sum(s["bytes"] for s in stores), "stores": stores}


def clear(folder: str | Path, fingerprint: str | None = None) -> int:
    """Delete the entries of one encoder (or of all) and leftovers of killed runs -> bytes freed.

    Other files in the folder are not touched. Raises DataError if the fingerprint is not in the cache.
    """
    stores = list(_stores(folder))
    known = {about["fingerprint"] for about, _ in stores}
    if fingerprint is not None and fingerprint not in known:
        raise DataError(f"the cache {str(folder)!r} holds nothing of {fingerprint!r}; {allowed(fingerprint, known)}")
    freed = 0
    for about, store in stores:
        if fingerprint not in (None, about["fingerprint"]):
            continue
        for path in [*store.glob("??/*.safetensors"), *store.glob("??/*.tmp"), *store.glob("*.tmp"), store / "about.json"]:
            freed += path.stat().st_size
            path.unlink()
        for inner in [*store.iterdir(), store]:
            if inner.is_dir() and not any(inner.iterdir()):
                inner.rmdir()
    for path in Path(folder).glob(INDEX.format("*")):
        freed += path.stat().st_size
        path.unlink()
    return freed


def _stores(folder: str | Path) -> Iterable[tuple[dict[str, Any], Path]]:
    for path in sorted(Path(folder).glob("*/about.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(about, dict) and {"kind", "fingerprint"} <= about.keys():
            yield about, path.parent


def _describe(store: Path, about: Mapping[str, Any]) -> None:
    if not (store / "about.json").exists():
        _replace(store / "about.json", (json.dumps(about, indent=2) + "\n").encode())


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
