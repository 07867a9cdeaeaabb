"""Losses of TRL on fixed log-ratios, kept as numbers so that tests need no TRL: trl_losses.json.

    python tests/oracle/trl_losses.py

Each loss is a branch in the middle of a long method, so it is taken out of the installed TRL's syntax tree and run alone.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

RECORD = Path(__file__).with_suffix(".json")
BETA, LABEL_SMOOTHING = 0.7, 0.2
CHOSEN = (0.1, -0.4, 0.0, 2.0, -30.0, 30.0, 0.9, -1.5)
REJECTED = (-0.3, 0.7, 0.0, 1.5, 20.0, -20.0, 1.1, -1.4)
LOSSES = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down")


def losses() -> dict[str, list[float]]:
    """Every one of `LOSSES` by the installed TRL, in float64. Raises ImportError where there is none."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise ImportError("TRL is not installed; pip install trl")
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "dpo_trainer.py").read_text("utf-8"))
    branches = {ast.unparse(node.test): node.body for node in ast.walk(tree) if isinstance(node, ast.If)}
    return {name: _run(branches[f"loss_type == {name!r}"], spec.origin) for name in LOSSES}


def _run(body: list[ast.stmt], origin: str) -> list[float]:
    chosen, rejected = (torch.tensor(values, dtype=torch.float64) for values in (CHOSEN, REJECTED))
    scope: dict[str, Any] = {
        "F": torch.nn.functional,
        "torch": torch,
        "math": math,
        "device": torch.device("cpu"),
        "self": SimpleNamespace(beta=BETA, label_smoothing=LABEL_SMOOTHING),
        "chosen_logratios": chosen,
        "rejected_logratios": rejected,
        "chosen_scores": chosen,
        "rejected_scores": rejected,
        "delta_score": chosen - rejected,
        "completion_mask": torch.ones(2 * len(chosen), 1),
    }
    exec(compile(ast.Module(body, []), origin, "exec"), scope)
    return scope["per_sequence_loss"].tolist()


def record() -> dict[str, Any]:
    """What the file holds: TRL's version, the inputs and the losses."""
    return {
        "trl": importlib.metadata.version("trl"),
        "beta": BETA,
        "label_smoothing": LABEL_SMOOTHING,
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "losses": losses(),
    }


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
