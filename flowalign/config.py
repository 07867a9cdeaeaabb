"""Configurations: YAML in, one sentence for each mistake, the resolved copy out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from flowalign import yaml_text
from flowalign.errors import ConfigError, allowed
from flowalign.sections import Section
from flowalign.settings import Config

Tree = TypeVar("Tree", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file; `overrides` are "section.key=value" with the value in YAML, applied in order.

    Raises ConfigError for a file that cannot be read, and as `parse` does.
    """
    return load_tree(Config, path, overrides)


def parse(data: Any, source: str = "the configuration", overrides: Sequence[str] = ()) -> Config:
    """Plain values (what YAML holds) -> Config; `source` names them in messages.

    Raises ConfigError for an unknown key, a missing one, and a value of the wrong type or out of range. Types are
    strict: "8" is not a number and 8 is not a text.
    """
    return parse_tree(Config, data, source, overrides)


def load_tree(tree: type[Tree], path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """`load` of another tree of settings."""
    try:
        data = yaml_text.read(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a YAML configuration.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give the path of a YAML configuration.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {yaml_text.problem(error)}; correct it there.") from error
    return parse_tree(tree, data, str(path), overrides)


def parse_tree(tree: type[Tree], data: Any, source: str = "the configuration", overrides: Sequence[str] = ()) -> Tree:
    """`parse` into another tree of settings."""
    if not isinstance(data, dict):
        needed = [name for name, field in tree.model_fields.items() if field.is_required()]
        raise ConfigError(
            f"{source} holds {_show(data)}; write the section{'s' * (len(needed) > 1)} {' and '.join(needed)}, at least."
        )
    # Through JSON: keys become texts, lists may become tuples, and the caller's own values stay untouched.
    data = json.loads(json.dumps(data, default=str))
    written = {_override(data, override): f"--set {override}" for override in overrides}
    try:
        return tree.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path, _ = _locate(data, first["loc"])
        origin = [said for key, said in written.items() if f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.")]
        raise ConfigError(_sentence(tree, first, data, origin[-1] if origin else source)) from error


def dump(config: Section) -> str:
    """The resolved configuration as YAML, every key written out; `load` gives an equal Config back."""
    return yaml_text.write(config.model_dump(mode="json"))


def check_knobs(name: str, knobs: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Hold the knobs of objective `name` against `inspect.signature(function, eval_str=True).parameters`.

    Knobs are the keyword-only parameters. Raises ConfigError for an unknown knob, a missing one without default, and a
    value that is not of the annotated type.
    """
    known = {key: parameter for key, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    for key, value in knobs.items():
        if key not in known:
            choice = allowed(key, known) if known else "it has no knobs"
            raise ConfigError(f"objective.{key} is not a knob of {name!r}; {choice}.")
        annotation = Any if known[key].annotation is inspect.Parameter.empty else known[key].annotation
        try:
            TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=True)
        except ValidationError as error:
            what = _plain(error.errors(include_url=False)[0]["msg"])
            raise ConfigError(f"objective.{key} of {name!r} cannot be {_show(value)}: {what}.") from error
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in knobs:
            raise ConfigError(f"objective.{key} is missing: {name!r} has no default for it; set it beside objective.name.")


def _override(data: dict[str, Any], override: str) -> str:
    """Write one "a.b=c" into `data`; returns "a.b"."""
    path, equals, text = override.partition("=")
    *sections, key = path.split(".")
    if not equals or not all([*sections, key]):
        raise ConfigError(f"--set {override} cannot be read; write section.key=value, such as --set train.steps=100.")
    for section in sections:
        data[section] = {} if data.get(section) is None else data[section]
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {section} is a value and has no keys of its own.")
    try:
        data[key] = json.loads(json.dumps(yaml_text.read(text), default=str))
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override} is not valid YAML: {yaml_text.problem(error)}; put quotes around text.") from error
    return path


def _sentence(tree: type[Section], error: Any, data: Any, source: str) -> str:
    """One validation error -> one sentence: where, the value, what is allowed."""
    path, value = _locate(data, error["loc"])
    *sections, key = (str(part) for part in error["loc"])
    fields = dict(tree.model_fields)
    for section in sections:
        fields = _fields(fields[section].annotation) if section in fields else {}
    if error["type"] == "extra_forbidden":
        moved = [f"{name}.{key}" for name, f in tree.model_fields.items() if key in _fields(f.annotation)]
        hint = f"did you mean {' or '.join(moved)}? " if moved and not sections else ""
        return f"{source}: {path} is not a setting; {hint}{allowed(key, fields)}."
    if error["type"] == "missing" and key in fields:
        return f"{source}: {'.'.join([*sections, key])} is missing; set it to {fields[key].description}."
    if error["type"] == "literal_error":
        return f"{source}: {path} cannot be {_show(value)}; {allowed(value, _choices(fields[key].annotation))}."
    hint = "; put quotes around it" if error["type"] == "string_type" and isinstance(value, int | float) else ""
    what = "a value is missing at its end" if error["type"] == "missing" else _plain(error["msg"])
    return f"{source}: {path} cannot be {_show(value)}: {what}{hint}."


def _fields(annotation: Any) -> dict[str, Any]:
    """The keys of a section, which may be one that can be null; none of anything else."""
    kinds = [each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")]
    return dict(kinds[0].model_fields) if kinds else {}


def _choices(annotation: Any) -> list[str]:
    """What a Literal allows, which may be one that can be null."""
    kinds = [each for each in (annotation, *get_args(annotation)) if get_origin(each) is Literal]
    return [choice for kind in kinds for choice in get_args(kind)]


def _locate(data: Any, loc: Sequence[int | str]) -> tuple[str, Any]:
    """The dotted path of an error and the value there; parts that name a union's branch are left out."""
    path: list[str] = []
    for part in loc:
        inside: Any = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
        if part in inside:
            path.append(str(part))
            data = data[part]
    return ".".join(path), data


def _plain(message: str) -> str:
    """Pydantic's words in a sentence of ours, and in those of YAML instead of JSON."""
    plain = (message[:1].lower() + message[1:]).removeprefix("value error, ")
    return plain.replace("an object", "a section of keys").replace("a valid array", "a list")


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
