"""What a fill found out about a source, kept beside the cache: the next start need not read a row of it again.

    CACHE/rows-<key>.safetensors    the arrays of each `Cached`, and as metadata what else the caller wants to know

Worth it only where a change of any picture is a change of the source's own files, so the caller's key must say which they
are, how large and from when: see `readers.stamp`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flowalign.data.cache import INDEX, LatentCache
from flowalign.data.cached import Cached
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


def write_index(path: Path, parts: Mapping[str, Cached], about: Mapping[str, Any]) -> None:
    """Keep the Cached of each part, and `about`, which JSON can hold."""
    arrays: dict[str, np.ndarray] = {}
    rest: dict[str, Any] = {}
    for name, cached in parts.items():
        arrays |= {f"{name}/{array}": np.ascontiguousarray(getattr(cached, array)) for array in ARRAYS}
        for texts in TEXTS:
            arrays[f"{name}/{texts}"] = np.frombuffer(json.dumps(getattr(cached, texts)).encode(), np.uint8).copy()
        plain = {"num_chosen": cached.num_chosen, "flips": cached.flips, "inside": cached.inside}
        plain["attached"] = cached.attached
        rest[name] = plain | {"bad": [asdict(row) for row in cached.bad]}
    with atomic(path) as temporary:
        save_file(arrays, temporary, {"parts": json.dumps(rest), "about": json.dumps(about)})


def read_index(path: Path, cache: LatentCache) -> tuple[dict[str, Cached], dict[str, Any]] | None:
    """What `write_index` kept; None where there is none, it is damaged, or an entry of it has left the cache."""
    parts: dict[str, Cached] = {}
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            about = json.loads(metadata["about"])
            for name, plain in json.loads(metadata["parts"]).items():
                arrays = {array: file.get_tensor(f"{name}/{array}") for array in ARRAYS}
                texts = {each: tuple(json.loads(bytes(file.get_tensor(f"{name}/{each}")))) for each in TEXTS}
                bad = tuple(BadRow(**row) for row in plain.pop("bad"))
                plain |= {"flips": tuple(plain["flips"]), "attached": tuple(plain["attached"])}
                parts[name] = Cached(**arrays, **texts, **plain, bad=bad)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    whole = all(cache.holds(each.pictures, each.flips, each.prompts) for each in parts.values())
    return (parts, about) if whole else None
