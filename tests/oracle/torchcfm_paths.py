"""What torchcfm computes on fixed pairs, kept as numbers so that tests need no torchcfm: torchcfm_paths.json.

    python tests/oracle/torchcfm_paths.py

The path and its velocity of conditional flow matching, and the cost of its exact optimal transport.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECORD = Path(__file__).with_suffix(".json")
SIGMA, PAIRS = 0.1, 32


def inputs() -> dict[str, Tensor]:
    """rejected, chosen `[32, 3, 2]`, times `[32]` and noise `[32, 3, 2]`, float64: sines, equal on every machine to 1e-12."""
    place = torch.arange(PAIRS * 6, dtype=torch.float64).view(PAIRS, 3, 2)
    return {
        "rejected": torch.sin(1.7 * place),
        "chosen": torch.cos(2.3 * place) + 0.5,
        "s": torch.linspace(0, 1, PAIRS, dtype=torch.float64),
        "noise": 2 * torch.sin(3.1 * place + 1),
    }


def record() -> dict[str, Any]:
    """What the file holds. Raises ImportError where there is no torchcfm."""
    from torchcfm import ConditionalFlowMatcher
    from torchcfm.optimal_transport import OTPlanSampler

    given = inputs()
    rejected, chosen, s, noise = given.values()
    theirs = ConditionalFlowMatcher(sigma=SIGMA)
    y = theirs.sample_xt(rejected, chosen, s, noise)
    plan = np.asarray(OTPlanSampler(method="exact").get_map(rejected, chosen))  # each row's mass is 1/32
    distances = (rejected.flatten(1)[:, None] - chosen.flatten(1)[None]).square().sum(2).numpy()
    return {
        "torchcfm": importlib.metadata.version("torchcfm"),
        "sigma": SIGMA,
        "y": y.tolist(),
        "u": theirs.compute_conditional_flow(rejected, chosen, s, y).tolist(),
        "ot_cost": float((plan * distances).sum() * PAIRS),
        "ot_partner": plan.argmax(0).tolist(),
    }


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record()) + "\n", encoding="utf-8")
