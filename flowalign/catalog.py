"""All objectives in one list: what they compare, what they need, their knobs. Ours are read as text, without torch."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowalign import plugins
from flowalign.errors import ConfigError
from flowalign.files import write_text

GROUPS = {
    "pairs": "Pairs: one chosen and one rejected picture",
    "groups": "Groups: several chosen and several rejected pictures",
    "lists": "Lists: pictures with grades, best first",
    "unpaired": "Unpaired: each picture is wanted or not",
}
"""By what an objective `takes`, with a heading each."""
BEGIN, END = "<!-- flowalign objectives --markdown docs/objectives.md -->", "<!-- end of the list -->"


@dataclass(frozen=True)
class Entry:
    """One objective, as it describes itself."""

    name: str
    takes: str
    title: str
    """First sentence of the module."""
    text: str
    """The function's docstring: the formula in the first line."""
    needs: tuple[str, ...]
    """Terms that the step must compute, beside the policy's errors."""
    carries: bool
    """Whether scalars go from one optimizer step to the next."""
    knobs: dict[str, str]
    """Name: default, as Python writes it; "" where there is none."""

    @property
    def formula(self) -> str:
        """The first line without what all have in common."""
        return self.text.partition("\n")[0].removesuffix("; returns `[B]`.")


def entries(installed: bool = True) -> list[Entry]:
    """All objectives by name; with `installed`, those of other packages too, which are imported.

    Raises ConfigError for an installed package's objective that cannot be imported.
    """
    found = []
    for name in plugins.names("objectives"):
        source = plugins.source("objectives", name)
        if source is not None:
            found.append(_read(name, source))
        elif installed:
            found.append(_inspect(name, plugins.load("objectives", name)))
    return found


def listing(installed: bool = True) -> dict[str, Any]:
    """{"summary": the list for people, "objectives": the same as data}."""
    known = entries(installed)
    wide = max(len(entry.name) for entry in known)
    blocks = []
    for takes, heading in GROUPS.items():
        lines = [f"  {entry.name:{wide}}  {entry.title} {_needs(entry)}".rstrip() for entry in known if entry.takes == takes]
        blocks.append("\n".join([heading, *lines]))
    return {"summary": "\n\n".join(blocks), "objectives": [asdict(entry) for entry in known]}


def page() -> str:
    """The package's own objectives in Markdown."""
    known, blocks = entries(installed=False), []
    for takes, heading in GROUPS.items():
        blocks.append(f"## {heading}\n")
        for entry in known:
            if entry.takes == takes:
                rest = entry.text.partition("\n")[2]
                knobs = ", ".join(f"`{name}` {value}" for name, value in entry.knobs.items()) or "none"
                needs = ", ".join(entry.needs) or "nothing"
                carried = "; carries scalars between steps" if entry.carries else ""
                blocks.append(f"### {entry.name}\n\n{entry.title}\n\n    {entry.formula}\n")
                blocks.append(f"{rest.strip()}\n" if rest.strip() else "")
                blocks.append(f"Needs: {needs}{carried}. Knobs: {knobs}.\n")
    return "\n".join(block for block in blocks if block)


def write_page(path: Path) -> dict[str, Any]:
    """Put `page` between the marks of a Markdown file. Raises ConfigError for a file without them."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); give the path of a page that holds the marks.") from error
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path} lacks the marks {BEGIN} and {END}; put them where the list shall stand.")
    write_text(path, f"{before}{begin}{page()}\n{end}{after}")
    return {"summary": f"The list of objectives in {path} is up to date.", "page": str(path)}


def _read(name: str, source: Path) -> Entry:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    calls = {ast.unparse(call.func): call for call in function.decorator_list if isinstance(call, ast.Call)}
    declared = calls["needs"]
    words = {word.arg: ast.literal_eval(word.value) for word in declared.keywords}
    values = ("" if value is None else ast.unparse(value) for value in function.args.kw_defaults)
    return Entry(
        name,
        words.get("takes", "pairs"),
        _sentence(ast.get_docstring(tree)),
        ast.get_docstring(function) or "",
        tuple(ast.literal_eval(argument) for argument in declared.args),
        "carries" in calls,
        dict(zip((argument.arg for argument in function.args.kwonlyargs), values, strict=True)),
    )


def _inspect(name: str, function: Any) -> Entry:
    parameters = inspect.signature(function).parameters.values()
    return Entry(
        name,
        getattr(function, "takes", "pairs"),
        _sentence(inspect.getdoc(inspect.getmodule(function)) or inspect.getdoc(function)),
        inspect.getdoc(function) or "",
        tuple(sorted(getattr(function, "needs", ()))),
        getattr(function, "carry", None) is not None,
        {
            each.name: "" if each.default is inspect.Parameter.empty else repr(each.default)
            for each in parameters
            if each.kind is inspect.Parameter.KEYWORD_ONLY
        },
    )


def _sentence(text: str | None) -> str:
    return re.split(r"\n|(?<=\.)\s", (text or "").strip())[0]


def _needs(entry: Entry) -> str:
    parts = [*entry.needs, *(["carries"] if entry.carries else [])]
    return f"[{', '.join(parts)}]" if parts else ""
