"""The rewards that can be named, as their files describe them: read as text, so that nothing is loaded for it."""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict, dataclass
from typing import Any

from flowalign import plugins

SHOWN = ("title", "range", "better", "licence", "differentiable", "reads_prompt", "source")
"""What of a card is shown."""


@dataclass(frozen=True)
class Entry:
    """One reward, before any weights are loaded."""

    name: str
    title: str
    range: str
    better: str
    licence: str
    differentiable: str
    reads_prompt: str
    source: str
    settings: dict[str, str]
    """Name: default, as Python writes it; "" where there is none."""


def list_rewards() -> dict[str, Any]:
    """{"summary": the list for people, "rewards": the same as data}."""
    entries = [_entry(name) for name in plugins.names("rewards")]
    wide = max(len(entry.name) for entry in entries)
    blocks = []
    for entry in entries:
        facts = [
            f"range {entry.range}",
            f"{entry.better} is better",
            "gradient" if entry.differentiable == "True" else "no gradient",
        ]
        lines = [f"{entry.name:{wide}}  {entry.title}", f"{'':{wide}}  {', '.join(facts)}; licence: {entry.licence}"]
        if entry.settings:
            said = ", ".join(f"{name}={value}" if value else name for name, value in entry.settings.items())
            lines.append(f"{'':{wide}}  settings: {said}")
        blocks.append("\n".join(lines))
    return {"summary": "\n".join(blocks), "rewards": [asdict(entry) for entry in entries]}


def _entry(name: str) -> Entry:
    source = plugins.source("rewards", name)
    text = source.read_text(encoding="utf-8") if source else inspect.getsource(inspect.getmodule(plugins.load("rewards", name)))  # type: ignore[arg-type]
    tree = ast.parse(text)
    card = next((call for call in ast.walk(tree) if isinstance(call, ast.Call) and _called(call) == "Card"), None)
    said = {word.arg: _plain(word.value) for word in card.keywords if word.arg} if card else {}
    first = (ast.get_docstring(tree) or name).partition("\n")[0]
    known = {key: said.get(key, "") for key in SHOWN}
    known["title"] = known["title"] if known["title"] and "{" not in known["title"] else first.rstrip(".")
    return Entry(name=name, **known, settings=_settings(tree))


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _plain(value: ast.expr) -> str:
    """A literal's value; for what depends on the weights, a text that says so."""
    try:
        found = ast.literal_eval(value)
    except ValueError:
        text = ast.unparse(value).replace("math.inf", "inf").replace("float('inf')", "inf")
        if isinstance(value, ast.Tuple):
            return text.replace("tower.scale", "scale")
        if isinstance(value, ast.Call) and value.args and isinstance(value.args[-1], ast.Constant):
            return str(value.args[-1].value)  # about.get("title", "the usual one")
        return "that of the weights"
    return f"({', '.join(f'{each:g}' for each in found)})" if isinstance(found, tuple) else str(found)


def _settings(tree: ast.Module) -> dict[str, str]:
    """Keywords of the function that `REWARD` is."""
    named = next(
        (
            node.value.id
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and ast.unparse(node.targets[0]) == "REWARD"
        ),
        "load",
    )
    constants = {
        ast.unparse(node.targets[0]): node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == named:
            defaults = [value and constants.get(ast.unparse(value), value) for value in node.args.kw_defaults]
            values = ["" if value is None else ast.unparse(value) for value in defaults]
            return dict(zip((argument.arg for argument in node.args.kwonlyargs), values, strict=True))
    return {}
