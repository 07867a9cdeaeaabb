"""Parts chosen by name: modules of the package's own folder first, entry points `flowalign.<kind>` of others second.

A module is a plugin if it lies in the folder and defines the plugin's name: `FAMILY` in flowalign/families, `REWARD` in
flowalign/scoring/rewards, a function named like the module in flowalign/align/objectives. An installed package offers one
in its `pyproject.toml`:

    [project.entry-points."flowalign.objectives"]
    mine = "my_package.losses:mine"
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from flowalign.errors import ConfigError, allowed

FOLDERS = {"families": "families", "objectives": "align/objectives", "rewards": "scoring/rewards"}
CONSTANTS = {"families": "FAMILY", "rewards": "REWARD"}
"""What a module of the kind offers its plugin as, where that is not a function named like the module."""


def names(kind: str) -> tuple[str, ...]:
    """All names of a kind ("families", "objectives", "rewards"), sorted. Files and package metadata are listed, not imported.

    Raises ConfigError for an unknown kind.
    """
    return tuple(sorted({*_modules(kind), *(entry.name for entry in entry_points(group=f"flowalign.{kind}"))}))


def load(kind: str, name: str) -> Any:
    """Import one: a family's class (its module's `FAMILY`), a reward's loader (`REWARD`) or an objective's function.

    Raises ConfigError for an unknown kind or name, and for an installed package's plugin that cannot be imported.
    """
    if name in _modules(kind):
        module = importlib.import_module(f"flowalign.{FOLDERS[kind].replace('/', '.')}.{name}")
        return getattr(module, CONSTANTS.get(kind, name))
    found = [entry for entry in entry_points(group=f"flowalign.{kind}") if entry.name == name]
    if not found:
        raise ConfigError(f"{name!r} is not one of the {kind}; {allowed(name, names(kind))}.")
    try:
        return found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{name!r} of the {kind} is offered by an installed package as {found[0].value!r}, which cannot be imported "
            f"({error}); repair or uninstall that package, or choose another name."
        ) from error


def source(kind: str, name: str) -> Path | None:
    """The file of one of the package's own; None for an installed package's. Raises ConfigError for an unknown kind."""
    return Path(__file__).parent / FOLDERS[kind] / f"{name}.py" if name in _modules(kind) else None


def _modules(kind: str) -> frozenset[str]:
    if kind not in FOLDERS:
        raise ConfigError(f"{kind!r} is not a kind of plugin; {allowed(kind, FOLDERS)}.")
    files = (Path(__file__).parent / FOLDERS[kind]).glob("[!_]*.py")
    # Read as text: importing each module to ask it would import torch.
    return frozenset(
        file.stem for file in files if re.search(_definition(kind, file.stem), file.read_text("utf-8"), re.MULTILINE)
    )


def _definition(kind: str, name: str) -> str:
    return rf"^{CONSTANTS[kind]}\b" if kind in CONSTANTS else rf"^def {name}\("
