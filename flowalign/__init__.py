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
    "runs",
]

_LAZY = {"Config": "Config", "dump_config": "dump", "load_config": "load"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("flowalign.config"), _LAZY[name])
    if name == "runs":
        return importlib.import_module("flowalign.runs")
    raise AttributeError(f"module 'flowalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
