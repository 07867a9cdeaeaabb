"""The shape of the package: who may import whom, and what no module does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flowalign import plugins

PACKAGE = Path(__file__).resolve().parents[1] / "flowalign"
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHT = (
    "flowalign",
    "flowalign.errors",
    "flowalign.files",
    "flowalign.yaml_text",
    "flowalign.config",
    "flowalign.sections",
    "flowalign.settings",
    "flowalign.plugins",
    "flowalign.catalog",
    "flowalign.plan.gpus",
    "flowalign.cli",
)
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "datasets", "open_clip", "timm"}

LAYERS = (
    (
        *("errors", "files", "heap", "parent", "yaml_text", "config", "plugins", "catalog"),
        *("sections", "settings", "flow.settings", "improve_settings"),
    ),
    ("rng", "align.terms", "align.objectives", "scoring.calibrate", "flow.path"),
    ("data",),
    ("families", "scoring.rewards", "flow.field"),
    ("align", "flow", "scoring"),
    ("train",),
    ("evaluate", "report", "serve"),
    ("sources",),
    ("device", "chosen"),
    ("setup",),
    ("watch", "probe"),
    ("plan",),
    ("runs",),
    ("demo",),
    ("demo_flow",),
    ("cli",),
    ("__main__",),
)
"""Lowest first: a module imports from lower layers and from its own part. The longest name that fits places a module."""
APART = ({"align", "flow", "scoring"}, {"families", "scoring.rewards", "flow.field"}, {"train", "align", "flow", "scoring"})
"""Parts that do not know each other; train knows a step, not an algorithm."""

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def module(path: Path) -> str:
    """ "align.step" for flowalign/align/step.py; "" for flowalign/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def place(name: str) -> tuple[int, str]:
    """Layer and part of a module."""
    fits = [(part, layer) for layer, parts in enumerate(LAYERS) for part in parts if f"{name}.".startswith(f"{part}.")]
    part, layer = max(fits, key=lambda fit: len(fit[0]), default=("", -1))
    return layer, part


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it; `from a import b` is a.b where that is a module of ours."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                inner = PACKAGE.parent / name.replace(".", "/")
                yield name if inner.is_dir() or inner.with_suffix(".py").is_file() else str(node.module)


def assigned(path: Path) -> set[str]:
    """Names that a module itself gives values to."""
    return {ast.unparse(target) for node in tree(path).body if isinstance(node, ast.Assign) for target in node.targets}


def names_and_strings(node: ast.AST) -> Iterator[str]:
    """What a node of the tree says by itself: a text, a name, an attribute, an imported name."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
        yield from re.findall(r"\w+", node.value) if "Pipeline" in node.value else ()  # code that is written out
    elif isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.alias):
        yield node.name


def forbidden(importer: str, imported: str) -> str | None:
    """Why `importer` must not import `imported` (both without "flowalign."), or None."""
    (layer, part), (other_layer, other) = place(importer), place(imported)
    if part == other:
        return None
    if other_layer > layer:
        return f"{importer} ({part}) is below {imported} ({other})"
    if other_layer == layer and layer >= 2 and part not in ("evaluate", "report"):
        return f"{importer} ({part}) and {imported} ({other}) are side by side"
    if any({part, other} <= parts for parts in APART):
        return f"{importer} ({part}) does not know {imported} ({other})"
    return None


@each_file
def test_imports_point_down(path: Path) -> None:
    name = module(path)
    if name == "":
        return  # the lazy names are checked below, by importing
    assert place(name)[0] >= 0, f"{name} has no place in LAYERS"
    for imported in imports(path):
        if imported.startswith("flowalign."):
            why = forbidden(name, imported.removeprefix("flowalign."))
            assert why is None, why


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("align.step", "families.base", True),
        ("align.step", "align.terms", True),
        ("align.objectives.dpo", "align.terms", True),
        ("align.objectives.dpo", "align.step", False),
        ("align.objectives.dpo", "data.batch", False),
        ("align.step", "flow.wrap", False),
        ("align.step", "flow.path", True),
        ("scoring.engine", "align.terms", True),
        ("scoring.rewards.clip", "families.sd", False),
        ("families.sd", "data.batch", True),
        ("data.cache", "families.base", False),
        ("train.loop", "align.step", False),
        ("train.loop", "align.terms", True),
        ("runs", "align.step", True),
        ("runs", "cli", False),
        ("evaluate.compare", "runs", False),
        ("report.page", "evaluate.compare", True),
        ("config", "rng", False),
        ("config", "errors", True),
        ("rng", "rngs", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    known = place(imported)[0] >= 0
    assert (known and forbidden(importer, imported) is None) is allowed


@each_file
def test_imports_are_absolute(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level]


@each_file
def test_the_layer_of_pure_functions_does_no_io(path: Path) -> None:
    layer, _ = place(module(path))
    if layer == 1:
        found = {name.partition(".")[0] for name in imports(path)}
        assert not found & {"os", "io", "pathlib", "json", "yaml", "PIL", "pyarrow", *HEAVY - {"torch"}}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print(*sorted({HEAVY | {'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_come_when_asked_for() -> None:
    code = (
        "import sys, flowalign as f; f.Config, f.load_config, f.dump_config; print('torch' in sys.modules, f.Config.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Config"]


def test_public_names_exist() -> None:
    import flowalign

    assert set(flowalign.__all__) <= set(dir(flowalign))
    for name in flowalign.__all__:
        assert getattr(flowalign, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        flowalign.nothing  # noqa: B018


@each_file
def test_no_assert_statements(path: Path) -> None:
    lines = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert not lines, f"raise an error from flowalign.errors at lines {lines}"


@each_file
def test_no_public_function_takes_any_keyword(path: Path) -> None:
    scopes = [tree(path), *(node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef))]
    functions = [node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    names = [node.name for node in functions if node.args.kwarg and not node.name.startswith("_")]
    assert not names, f"name the keywords of {names}"


def test_one_module_knows_deepspeed_and_imports_it_where_it_is_used() -> None:
    knowing = {module(path) for path in FILES if any(name.partition(".")[0] == "deepspeed" for name in imports(path))}
    assert knowing == {"train.zero"}
    (path,) = (path for path in FILES if module(path) == "train.zero")
    assert not any(
        "deepspeed" in ast.unparse(node) for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)
    )


@each_file
def test_no_module_is_too_long_to_read(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 350, f"{lines} lines: split by noun"


FAMILIES = [path for path in FILES if path.parent.name == "families" and "FAMILY" in assigned(path)]
SPREADS = {("runs.scoring", "sd"), ("report.scores", "sd")}
"""Where "sd" is a standard deviation."""


@cache
def families() -> frozenset[str]:
    """What only `families/` may say: the families' names and those of their pipelines' classes."""
    classes = (plugins.load("families", path.stem).pipeline_classes for path in FAMILIES)
    return frozenset({path.stem for path in FAMILIES}.union(*classes))


@each_file
def test_families_are_known_by_name_in_their_folder_only(path: Path) -> None:
    if path.parent.name == "families":
        return
    said = {(value, node.lineno) for node in ast.walk(tree(path)) for value in names_and_strings(node)}
    found = {(word, line) for word, line in said if word in families() and (module(path), word) not in SPREADS}
    assert not found, f"ask the checkpoint's family instead of naming one: {sorted(found)}"
    assert not {f"flowalign.families.{each.stem}" for each in FAMILIES} & set(imports(path))


def test_the_families_are_those_that_are_found() -> None:
    assert {path.stem for path in FAMILIES} == set(plugins.names("families"))
    assert {"sd3", "StableDiffusion3Pipeline"} <= families()


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_a_family_is_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 160, f"{lines} lines: what other families do as well belongs into latent.py"


@each_file
def test_nothing_unpickles(path: Path) -> None:
    assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & {name.partition(".")[0] for name in imports(path)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [word for word in node.keywords if word.arg == "weights_only" and ast.unparse(word.value) == "True"]
            assert safe, f"torch.load at line {node.lineno} without weights_only=True"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False", f"allow_pickle at line {node.value.lineno}"
