"""What a fill found out about a source, kept beside the cache: the next start need not read a row of it again.

    CACHE/rows-<key>.safetensors    the arrays of each `Cached`, what is to be trained on where only a part of that is in
                                    them, and as metadata what else the caller wants to know

A longer run adds its rows, and what was found of others stays as it was. Worth it only where a change of any picture is a
change of the source's own files, so the caller's key must say which they are, how large and from when: see `readers.stamp`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flowalign.data.cache import INDEX, LatentCache
from flowalign.data.cached import Cached
from flowalign.data.reach import Tried, Usable
from flowalign.data.readers import BadRow
from flowalign.files import atomic

ARRAYS = (
    "indices",
    "pictures",
    "prompt",
    "ids",
    "preference",
    "weight",
    "scores",
    "grades",
    "annotator",
    "objective_weights",
    "told",
)
TEXTS = ("prompts", "annotators")


def index_path(cache: LatentCache, key: Mapping[str, Any]) -> Path:
    """Where the index of what `key` describes is or will be; the cache's encoders and resolution count as well."""
    text = json.dumps([cache.identity, key], sort_keys=True, default=str)
    return cache.folder / INDEX.format(hashlib.blake2b(text.encode(), digest_size=10).hexdigest())


@dataclass(frozen=True)
class Known:
    """What an index holds."""

    parts: dict[str, Cached]
    """Without "train", where only a part of it was prepared and none of that can be used."""
    about: dict[str, Any]
    """What the caller wanted to be kept."""
    tried: Tried | None
    """What there is to train on, where it was prepared in part; its Cached is the one of the part "train"."""


def write_index(path: Path, parts: Mapping[str, Cached], about: Mapping[str, Any], tried: Tried | None = None) -> None:
    """Keep the Cached of each part, and `about`, which JSON can hold; of `tried`, what is not in them."""
    arrays: dict[str, np.ndarray] = {}
    rest: dict[str, Any] = {}
    for name, cached in parts.items():
        arrays |= {f"{name}/{array}": np.ascontiguousarray(getattr(cached, array)) for array in ARRAYS}
        for texts in TEXTS:
            arrays[f"{name}/{texts}"] = np.frombuffer(json.dumps(getattr(cached, texts)).encode(), np.uint8).copy()
        plain = {"num_chosen": cached.num_chosen, "flips": cached.flips, "inside": cached.inside}
        plain["attached"] = cached.attached
        rest[name] = plain | {"bad": [asdict(row) for row in cached.bad]}
    metadata = {"parts": json.dumps(rest), "about": json.dumps(about)}
    if tried is not None:
        arrays |= {f"usable/{name}": np.ascontiguousarray(getattr(tried.usable, name)) for name in ("rows", "prompts")}
        rows = {"bad": tried.usable.bad, "broken": tried.broken}
        listed = {name: [asdict(row) for row in each] for name, each in rows.items()}
        metadata["usable"] = json.dumps({"ids": tried.usable.ids, **listed})
    with atomic(path) as temporary:
        save_file(arrays, temporary, metadata)


def read_index(path: Path) -> Known | None:
    """What `write_index` kept; None where there is none, or it is damaged. Entries may have left the cache since."""
    parts: dict[str, Cached] = {}
    tried = None
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            about = json.loads(metadata["about"])
            for name, plain in json.loads(metadata["parts"]).items():
                arrays = {array: file.get_tensor(f"{name}/{array}") for array in ARRAYS}
                texts = {each: tuple(json.loads(bytes(file.get_tensor(f"{name}/{each}")))) for each in TEXTS}
                bad = _rows(plain.pop("bad"))
                plain |= {"flips": tuple(plain["flips"]), "attached": tuple(plain["attached"])}
                parts[name] = Cached(**arrays, **texts, **plain, bad=bad)
            if "usable" in metadata:
                rest = json.loads(metadata["usable"])
                usable = (file.get_tensor(f"usable/{name}") for name in ("rows", "prompts"))
                found = Usable(*usable, rest["ids"], _rows(rest["bad"]))
                tried = Tried(found, parts.get("train"), _rows(rest["broken"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return Known(parts, about, tried)


def _rows(listed: Iterable[Mapping[str, Any]]) -> tuple[BadRow, ...]:
    return tuple(BadRow(**row) for row in listed)
