"""Small flows that are trained in a second, by the one training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowalign.flow.arrays import ArrayPairs
from flowalign.flow.field import Field, FieldSettings, make_field
from flowalign.flow.settings import Match, Train
from flowalign.runs.flow_fit import fit_field


def train(
    folder: Path, pairs: ArrayPairs, settings: FieldSettings, *, sigma: float = 0.0, coupling: str = "paired", **options: Any
) -> Field:
    """A field trained on these pairs."""
    plain = dict(
        steps=300,
        batch_size=64,
        learning_rate=3e-3,
        schedule="cosine",
        weight_decay=0.0,
        precision="fp32",
        device="cpu",
        ema=None,
    )
    dropout = options.pop("context_dropout", 0.0)
    field = make_field(settings, seed=0)
    cfg = Train(**plain | {"log_every": 100, "save_every": None} | options)
    found = fit_field(field, pairs, folder, cfg, Match(coupling=coupling, sigma=sigma), context_dropout=dropout, progress=False)
    assert found["finished"]
    return field.eval()
