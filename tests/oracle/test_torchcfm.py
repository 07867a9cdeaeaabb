"""The path and the couplings against those of torchcfm, another implementation of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json

import pytest
import torch

from flowalign.flow.path import couple, point, squared_distances, target
from tests.oracle import torchcfm_paths

RECORD = json.loads(torchcfm_paths.RECORD.read_text(encoding="utf-8"))
GIVEN = torchcfm_paths.inputs()


def recorded(name: str) -> torch.Tensor:
    return torch.tensor(RECORD[name], dtype=torch.float64)


def test_the_path_and_its_velocity_agree() -> None:
    y = point(GIVEN["rejected"], GIVEN["chosen"], GIVEN["s"], GIVEN["noise"], RECORD["sigma"])
    torch.testing.assert_close(y, recorded("y"), rtol=0, atol=1e-10)
    torch.testing.assert_close(target(GIVEN["rejected"], GIVEN["chosen"]), recorded("u"), rtol=0, atol=1e-10)


def test_ot_joins_the_same_and_costs_as_much() -> None:
    rejected, chosen = GIVEN["rejected"], GIVEN["chosen"]
    rows = len(chosen)
    partner = couple("ot", rejected, chosen, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows))
    assert partner.tolist() == RECORD["ot_partner"]
    assert partner.tolist() != list(range(rows))
    cost = squared_distances(chosen, rejected)[torch.arange(rows), partner].sum()
    assert float(cost) == pytest.approx(RECORD["ot_cost"], rel=1e-9)


def test_the_record_is_that_of_the_installed_torchcfm() -> None:
    version = RECORD["torchcfm"]
    if importlib.util.find_spec("torchcfm") is None or importlib.metadata.version("torchcfm") != version:
        pytest.skip(f"the recorded values are those of torchcfm {version}, which is not installed")
    found = torchcfm_paths.record()
    for name in ("y", "u"):
        torch.testing.assert_close(torch.tensor(found.pop(name), dtype=torch.float64), recorded(name), rtol=0, atol=1e-10)
    assert found.pop("ot_cost") == pytest.approx(RECORD["ot_cost"])
    assert found == {name: RECORD[name] for name in ("torchcfm", "sigma", "ot_partner")}
