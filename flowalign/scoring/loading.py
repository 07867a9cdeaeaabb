"""Rewards from what a user writes: a name, a mapping with settings, or a file that lists both.

clip                                                         a name
{name: aesthetic, as: style, weights: style.safetensors}     with settings, and the column's name
samples/emoji/rewards.yaml                                   a YAML or JSON file with a list of these
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from flowalign import plugins, yaml_text
from flowalign.errors import ConfigError, allowed
from flowalign.scoring.rewards.base import Reward, Shelf

FILES = (".yaml", ".yml", ".json")
NAME, COLUMN = "name", "as"
COLUMN_NAME = re.compile(r"[A-Za-z][\w-]*\Z")


def load_rewards(specs: Sequence[str | Mapping[str, Any]], shelf: Shelf) -> list[Reward]:
    """The rewards, in order, on backbones of `shelf`; paths in a file are relative to that file.

    Raises ConfigError for an unknown reward or setting, a value of the wrong kind, two rewards with one column name, and for
    none at all; what the reward's own loader raises for weights that are missing, which says where to get them.
    """
    wanted = [each for spec in specs for each in _expand(spec)]
    if not wanted:
        raise ConfigError("no rewards are named; flowalign rewards lists them.")
    columns = [str(spec.get(COLUMN, spec[NAME])) for spec in wanted]
    for place, column in enumerate(columns):
        if not COLUMN_NAME.match(column):
            raise ConfigError(f"{column!r} cannot name a column; use letters, digits, _ and -, beginning with a letter.")
        if column in columns[:place]:
            raise ConfigError(f"two rewards are named {column!r}; give one of them another name with as: NAME.")
    loaders = [_loader(spec) for spec in wanted]  # all mistakes first: the first tower may take a minute to load
    return [_named(load(shelf), column) for load, column in zip(loaders, columns, strict=True)]


def _expand(spec: str | Mapping[str, Any]) -> list[dict[str, Any]]:
    """What one entry stands for, as mappings."""
    if not isinstance(spec, str) or not spec.lower().endswith(FILES):
        return [_mapping(spec)]
    path = Path(spec).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else yaml_text.read(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = yaml_text.problem(error) if isinstance(error, yaml.YAMLError) else error
        raise ConfigError(f"{path} cannot be read as a list of rewards ({said}); write one reward a line.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, (str, dict)) for entry in entries):
        raise ConfigError(f"{path} is not a list of rewards; write - NAME or - {{name: NAME, ...}}, one a line.")
    inner = [entry for entry in entries if isinstance(entry, str) and entry.lower().endswith(FILES)]
    if inner:
        raise ConfigError(f"{path} lists the file {inner[0]}; name that file beside it instead.")
    return [_beside(_mapping(entry), path.parent) for entry in entries]


def _mapping(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(spec, str):
        return {NAME: spec}
    if not isinstance(spec.get(NAME), str):
        raise ConfigError(f"{dict(spec)} names no reward; write {{name: NAME, ...}}.")
    return dict(spec)


def _beside(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With paths that lie in `folder` made absolute."""
    return {
        key: str((folder / value).resolve())
        if isinstance(value, str) and key not in (NAME, COLUMN) and value and (folder / value).exists()
        else value
        for key, value in spec.items()
    }


def _loader(spec: Mapping[str, Any]) -> Callable[[Shelf], Reward]:
    """The reward's loader with its settings, which are checked against its signature."""
    name = spec[NAME]
    load = plugins.load("rewards", name)
    settings = {key: value for key, value in spec.items() if key not in (NAME, COLUMN)}
    parameters = {
        key: each for key, each in inspect.signature(load).parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY
    }
    hints = typing.get_type_hints(load)
    for key, value in settings.items():
        if key not in parameters:
            choices = allowed(key, [*parameters, COLUMN])
            raise ConfigError(f"the reward {name} has no setting {key!r}; {choices}.")
        try:
            settings[key] = TypeAdapter(hints.get(key, Any)).validate_python(value, strict=isinstance(value, (str, bool)))
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise ConfigError(f"{key} of the reward {name} is {value!r}: {said[0].lower()}{said[1:]}.") from None
    missing = [key for key, each in parameters.items() if each.default is inspect.Parameter.empty and key not in settings]
    if missing:
        raise ConfigError(f"the reward {name} needs {', '.join(missing)}; write {{name: {name}, {missing[0]}: ...}}.")
    return lambda shelf: load(shelf, **settings)


def _named(reward: Reward, column: str) -> Reward:
    """The same reward under another column name."""
    if reward.card.name == column:
        return reward
    renamed = copy.copy(reward)
    object.__setattr__(renamed, "card", replace(reward.card, name=column))  # rewards may be frozen
    return renamed
