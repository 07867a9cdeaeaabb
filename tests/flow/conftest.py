"""A tiny flow that was fitted by the command's own function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowalign.config import parse_tree
from flowalign.flow.settings import FlowConfig


@pytest.fixture(scope="session")
def flow_settings(folders: dict[str, Path], votes: Path) -> Callable[..., FlowConfig]:
    """flow_settings(output, "train.steps=3", ...): a tiny flow on the CPU, with overrides as on the command line."""

    def make(output: Path, *overrides: str) -> FlowConfig:
        tree: dict[str, Any] = {
            "model": {"checkpoint": str(folders["epsilon"])},
            "data": {"train": str(votes), "validation": str(votes), "resolution": 16},
            "field": {"width": 16, "levels": 2},
            "train": {
                "steps": 4,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "precision": "fp32",
                "ema": 0.5,
                "validation_draws": 1,
                "log_every": 1,
                "device": "cpu",
            },
            "solve": {"steps": 2},
            "output": str(output),
        }
        return parse_tree(FlowConfig, tree, "test", overrides)

    return make


@pytest.fixture(scope="session")
def flow_run(flow_settings: Callable[..., FlowConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run, in latents and told prompts."""
    from flowalign import runs

    folder = tmp_path_factory.mktemp("flow") / "run"
    assert runs.fit_flow(flow_settings(folder), progress=False)["finished"]
    return folder
