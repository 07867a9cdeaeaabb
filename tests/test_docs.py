"""The documentation says what is so: its commands parse, its configurations load, its code runs, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowalign import catalog, cli, config, plugins, yaml_text
from flowalign.data.columns import conventions
from flowalign.flow.settings import FlowConfig
from flowalign.improve_settings import ImproveConfig
from flowalign.sections import Section
from flowalign.settings import Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "samples").glob("*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced code block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every command line: in fenced code blocks, in indented ones, and in code spans."""
    text = page.read_text(encoding="utf-8")
    fenced = "".join(block for _, block in blocks(page))
    lines = re.findall(r"^(flowalign .*)$", fenced, re.MULTILINE) + re.findall(r"^ {4}(flowalign .*)$", text, re.MULTILINE)
    spans = re.findall(r"`(?:torchrun[^`]* -m )?(flowalign [a-z][^`]*)`", text)
    return [line for line in lines + spans if "--help" not in line]


COMMANDS = {page: commands(page) for page in PAGES}


def test_the_readme_shows_every_command() -> None:
    shown = {line.split()[1] for line in COMMANDS[ROOT / "README.md"]}
    (actions,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
    assert shown == {*actions.choices}


@pytest.mark.parametrize("line", sorted({line for lines in COMMANDS.values() for line in lines}))
def test_commands_parse(line: str) -> None:
    options = cli._parser().parse_args(cli._dashes(shlex.split(line)[1:]))
    assert callable(options.command)


VERBS: dict[str, type[Section]] = {"align": Config, "flow fit": FlowConfig, "improve": ImproveConfig}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_load_and_name_their_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = re.fullmatch(rf"# flowalign ([a-z ]+) configs/{re.escape(path.name)}", first)
    assert named is not None
    tree = VERBS[named[1]]
    settings = config.load_tree(tree, path)
    assert config.parse_tree(tree, yaml.safe_load(config.dump(settings))) == settings


@each_page
def test_yaml_parses_as_a_configuration(page: Path) -> None:
    for language, text in blocks(page):
        if language == "yaml":
            if (tree := {"flow.md": FlowConfig, "improve.md": ImproveConfig}.get(page.name)) is not None:
                config.parse_tree(tree, yaml_text.read(text), page.name)
                continue
            settings = config.parse(yaml_text.read(text), page.name)
            assert settings.objective.name == "dpo"


def test_overrides_in_the_readme_are_settings(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(next(text for language, text in blocks(ROOT / "README.md") if language == "yaml"))
    found = [
        cli._parser().parse_args(shlex.split(line)[1:]).overrides for line in COMMANDS[ROOT / "README.md"] if " align " in line
    ]
    overrides = [override for each in found for override in each]
    assert overrides
    for override in overrides:
        config.load(path, [override])


@each_page
def test_python_compiles(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, f"{page.name} code block", "exec")


def test_names_that_the_readme_imports_exist() -> None:
    import flowalign

    text = "".join(text for language, text in blocks(ROOT / "README.md") if language == "python")
    for name in set(re.findall(r"\bflowalign\.(\w+)\(", text)):
        assert callable(getattr(flowalign, name)), name
    for name in set(re.findall(r"\bflowalign\.runs\.(\w+)\(", text)):
        assert callable(getattr(flowalign.runs, name)), name


def test_the_objective_in_the_readme_is_a_squared_hinge() -> None:
    import torch

    from flowalign.align.terms import Terms

    code = next(text for language, text in blocks(ROOT / "README.md") if language == "python" and "def squared" in text)
    names: dict[str, Any] = {}
    exec(code, names)
    squared, h = names["squared_hinge"], 0.05 * torch.randn(64, 2)
    vote = Terms(-2 * h, torch.zeros(64, 2), None, torch.ones(64))
    expected = [max(0.0, 1 - 30 * (chosen - rejected)) for chosen, rejected in h.tolist()]
    assert squared(vote, beta=30.0).tolist() == pytest.approx([value**2 for value in expected], rel=1e-4, abs=1e-6)
    assert squared(vote, beta=30.0, power=3.0).tolist() == pytest.approx([value**3 for value in expected], rel=1e-4, abs=1e-6)
    assert squared.needs == {"reference"}


def test_the_objective_that_is_added_in_the_docs_meets_the_contract() -> None:
    from tests.align import objective_rows, test_objectives

    (text,) = (text for language, text in blocks(ROOT / "docs" / "objectives.md") if language == "diff")
    parts = dict(re.findall(r"^\+\+\+ b/(\S+)\n((?:\+(?!\+\+ ).*\n|\+\n)+)", text, re.MULTILINE))
    added = {path: re.sub(r"^\+", "", part, flags=re.MULTILINE) for path, part in parts.items()}
    names: dict[str, Any] = {}
    exec(added["flowalign/align/objectives/squared_hinge.py"], names)
    rows = eval("{" + added["tests/align/objective_rows.py"] + "}", vars(objective_rows))
    for row in rows["squared_hinge"]:
        for check in test_objectives.CHECKS:
            check(names["squared_hinge"], row)


def test_the_page_of_objectives_is_not_stale() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert text.partition(f"{catalog.BEGIN}\n")[2].partition(f"\n{catalog.END}")[0] == catalog.page(), (
        "run flowalign objectives --markdown docs/objectives.md"
    )


def test_derivations_are_of_objectives_and_are_linked() -> None:
    folder = ROOT / "docs" / "methods"
    linked = set(re.findall(r"\]\((\w+)\.md\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.stem for page in folder.glob("*.md")} - {"README"}
    switches = set(re.findall(r"\]\(methods/(\w+)\.md\)", (ROOT / "docs" / "switches.md").read_text(encoding="utf-8")))
    assert linked == (linked & set(plugins.names("objectives"))) | switches


def test_every_convention_is_documented_with_its_columns() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^|]*`) \|", text, re.MULTILINE))
    for convention in conventions():
        assert rows.pop(convention.name) == ", ".join(f"`{column}`" for column in convention.columns)
    assert set(rows) <= {"jsonl", "folder", "parquet", "webdataset", "datasets"}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:flowalign|tests|configs|samples|docs|benchmarks)/[\w./-]*\w)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_tree_in_the_readme_is_the_package() -> None:
    text = next(text for language, text in blocks(ROOT / "README.md") if text.startswith("flowalign/"))
    package = text.split("configs/  ")[0]
    for name in re.findall(r"\b(\w+(?:\.py|/))", package.removeprefix("flowalign/")):
        assert list((ROOT / "flowalign").rglob(name)), f"the tree names {name}"
    folders = {path.name for path in (ROOT / "flowalign").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders <= set(re.findall(r"^  (\w+)/ ", package, re.MULTILINE))
