"""YAML as people write it: 1e-5 is a number, a key written twice is a mistake."""

from __future__ import annotations

import re
from typing import Any

import yaml


def read(text: str) -> Any:
    """Plain values. Raises yaml.YAMLError; `problem` puts it into words."""
    return yaml.load(text, Loader=_Loader)


def write(data: Any) -> str:
    """Keys in their order; `read` gives equal values back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def problem(error: Any) -> str:
    """What is wrong and where, fit for the middle of a sentence."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else " ".join(str(error).split())


# YAML 1.1, which PyYAML speaks, asks for a dot and a signed exponent in a float, so that 1e-5 would be a text.
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number and refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            text = str(key.value)
            if text in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"the key {text!r} is written twice", key.start_mark)
            seen.add(text)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that `_Loader` would read as numbers, and escapes breaks other than newlines.

    PyYAML would write those as they are, and read U+0085 as a newline.
    """

    def represent_text(self, text: str) -> yaml.Node:
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
