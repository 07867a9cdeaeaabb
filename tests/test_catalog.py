"""The list of objectives says what the functions themselves say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from flowalign import catalog, plugins
from flowalign.errors import ConfigError

OUTSIDE = '''"""A loss of others. With more to say."""
from flowalign.align.terms import carries, needs

@carries(start=dict, observe=dict, advance=dict)
@needs("scores", "grades", takes="lists")
def theirs(terms, carried, *, beta: float, mode: str = "plain"):
    """Their formula; returns `[B]`.

    Their explanation.
    """
'''


def test_what_is_read_is_what_is_imported() -> None:
    entries = catalog.entries(installed=False)
    assert [entry.name for entry in entries] == list(plugins.names("objectives"))
    for entry in entries:
        function = plugins.load("objectives", entry.name)
        assert set(entry.needs) == function.needs
        assert entry.takes == function.takes
        assert entry.carries == (function.carry is not None)
        assert entry.text == inspect.getdoc(function)
        parameters = inspect.signature(function).parameters
        assert entry.knobs == {
            name: repr(each.default) for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY
        }


def test_every_objective_has_a_title_a_formula_a_group_and_its_convention() -> None:
    for entry in catalog.entries(installed=False):
        assert entry.title.endswith(".")
        assert entry.text.partition("\n")[0].endswith("; returns `[B]`."), entry.name
        assert entry.takes in catalog.GROUPS
        assert entry.name in ("all_pairs",) or "Source: " in entry.text, entry.name
        if "beta" in entry.knobs and entry.name != "dpo":
            assert "`dpo`" in entry.text or "`simpo`" in entry.text, entry.name  # whose β it is


def test_the_list_has_every_name_once() -> None:
    listing = catalog.listing(installed=False)
    lines = [line.split()[0] for line in listing["summary"].splitlines() if line.startswith("  ")]
    assert sorted(lines) == list(plugins.names("objectives"))
    assert [entry["name"] for entry in listing["objectives"]] == sorted(lines)
    assert catalog.page().count("\n### ") == len(lines)


@pytest.fixture
def installed(install: Callable[..., None]) -> None:
    install("catalogued_losses", OUTSIDE, "theirs = catalogued_losses:theirs")


@pytest.mark.usefixtures("installed")
def test_an_installed_packages_objective_is_in_the_list_and_not_on_the_page() -> None:
    (entry,) = (entry for entry in catalog.entries() if entry.name == "theirs")
    assert (entry.takes, entry.title, entry.formula) == ("lists", "A loss of others.", "Their formula")
    assert (entry.needs, entry.carries) == (("grades", "scores"), True)
    assert entry.knobs == {"beta": "", "mode": "'plain'"}
    assert "  theirs               A loss of others. [grades, scores, carries]" in catalog.listing()["summary"]
    assert "theirs" not in catalog.page()


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{catalog.BEGIN}\nstale\n{catalog.END}\nafter\n")
    assert catalog.write_page(page)["page"] == str(page)
    assert page.read_text() == f"before\n{catalog.BEGIN}\n{catalog.page()}\n{catalog.END}\nafter\n"
    catalog.write_page(page)
    assert page.read_text().count("### dpo\n") == 1
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="lacks the marks"):
        catalog.write_page(page)
