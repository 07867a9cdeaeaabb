"""Losses against those of TRL, another implementation of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from typing import Any

import pytest
import torch

from flowalign import plugins
from flowalign.align.terms import Terms
from tests.oracle import trl_losses

RECORD = json.loads(trl_losses.RECORD.read_text(encoding="utf-8"))
BETA, EPSILON = RECORD["beta"], RECORD["label_smoothing"]
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {"beta": BETA}),
    "hinge": ("hinge", {"beta": BETA}),
    "ipo": ("ipo", {"tau": BETA}),
    "robust": ("rdpo", {"beta": BETA, "flips": EPSILON}),
    "exo_pair": ("exo", {"beta": BETA, "label_smoothing": EPSILON}),
    "nca_pair": ("nca", {"beta": BETA}),
    "sppo_hard": ("sppo", {"beta": BETA}),
    "apo_zero": ("apo_zero", {"beta": BETA}),
    "apo_down": ("apo_down", {"beta": BETA}),
}


def test_every_recorded_loss_is_compared() -> None:
    assert set(RECORD["losses"]) == set(OURS) == set(trl_losses.LOSSES)


@pytest.mark.parametrize("theirs", OURS)
def test_agrees_with_trl(theirs: str) -> None:
    name, knobs = OURS[theirs]
    h = torch.tensor([RECORD["chosen"], RECORD["rejected"]], dtype=torch.float64).T
    made = Terms(-2 * h, torch.zeros_like(h), None, torch.ones(len(h), dtype=torch.float64))
    loss = plugins.load("objectives", name)(made, **knobs)
    recorded = torch.tensor(RECORD["losses"][theirs], dtype=torch.float64)
    torch.testing.assert_close(loss, recorded, rtol=1e-6, atol=1e-12)  # TRL rounds ε of exo_pair to float32


def test_the_record_is_that_of_the_installed_trl() -> None:
    if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl") != RECORD["trl"]:
        pytest.skip(f"the recorded losses are those of TRL {RECORD['trl']}, which is not installed")
    found = trl_losses.record()
    assert found["losses"].keys() == RECORD["losses"].keys()
    for name, values in found.pop("losses").items():
        assert values == pytest.approx(RECORD["losses"][name], rel=1e-12)
    assert json.loads(json.dumps(found)) == {key: value for key, value in RECORD.items() if key != "losses"}
