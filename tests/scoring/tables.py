"""Score tables made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from flowalign.scoring.table import IDENTITY, ScoreTable
from tests.scoring.pixels import card


def table_of(
    prompts: Sequence[str],
    scores: Mapping[str, Any],
    *,
    paths: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    cards: Mapping[str, Mapping[str, Any]] | None = None,
    more: Mapping[str, Sequence[Any]] | None = None,
) -> ScoreTable:
    """scores: reward -> one a picture, NaN for none. paths: by default /p/0.png and so on. cards: what differs on them."""
    count = len(prompts)
    columns: dict[str, Any] = {
        "image": list(images or (f"{row:064x}" for row in range(count))),
        "path": list(paths or (f"/p/{row}.png" for row in range(count))),
        "prompt": list(prompts),
    }
    columns |= {name: list(values) for name, values in (more or {}).items()}
    arrays = {name: pa.array(values, IDENTITY.get(name)) for name, values in columns.items()}
    table = ScoreTable(pa.table(arrays), {})
    about = {name: card(name, reads_prompt=False, **(cards or {}).get(name, {})) for name in scores}
    added = {f"raw.{name}": np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    return ScoreTable(table.having(added).data, about)


def bradley_terry(
    count: int, *, temperature: float = 1.0, spread: float = 1.5, seed: int = 0, each: int = 10
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(differences `[n]`, votes `[n]` drawn from σ(d/τ), prompts `[n]`, `each` pairs of one)."""
    rng = np.random.default_rng(seed)
    d = rng.normal(0, spread * temperature, count)
    votes = (rng.random(count) < 1 / (1 + np.exp(-d / temperature))).astype(float)
    return d, votes, [f"prompt {row // each}" for row in range(count)]
