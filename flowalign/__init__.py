"""flowalign: align Stable Diffusion on preference pairs.

    import flowalign

    config = flowalign.load_config("configs/my.yaml", ["train.steps=200"])
    flowalign.runs.align(config, resume=False)

Verbs live in `flowalign.runs`, because `flowalign.align`, `flowalign.evaluate` and `flowalign.report` are packages.
Importing flowalign imports no torch; `runs` does, when first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowalign.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FlowalignError,
    MissingExtraError,
    NonFiniteError,
    PeerError,
    RunError,
    SelfTestError,
    UserError,
)

if TYPE_CHECKING:
    from flowalign import runs
    from flowalign.config import dump as dump_config
    from flowalign.config import load as load_config
    from flowalign.families.personal import personal
    from flowalign.families.steer import steered, unsteered
    from flowalign.flow.improve import load_flow
    from flowalign.flow.wrap import wrap
    from flowalign.settings import Config

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "FlowalignError",
    "MissingExtraError",
    "NonFiniteError",
    "PeerError",
    "RunError",
    "SelfTestError",
    "UserError",
    "__version__",
    "dump_config",
    "load_config",
    "load_flow",
    "personal",
    "runs",
    "steered",
    "unsteered",
    "wrap",
]

_LAZY = {
    "Config": ("config", "Config"),
    "dump_config": ("config", "dump"),
    "load_config": ("config", "load"),
    "load_flow": ("flow.improve", "load_flow"),
    "personal": ("families.personal", "personal"),
    "steered": ("families.steer", "steered"),
    "unsteered": ("families.steer", "unsteered"),
    "wrap": ("flow.wrap", "wrap"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, own = _LAZY[name]
        return getattr(importlib.import_module(f"flowalign.{module}"), own)
    if name == "runs":
        return importlib.import_module("flowalign.runs")
    raise AttributeError(f"module 'flowalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
