from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowalign import plugins
from flowalign.errors import ConfigError


@pytest.fixture
def installed(install: Callable[..., None], tmp_path: Path) -> Path:
    """An installed package that offers objectives: one of its own, one named like ours, one that cannot be imported."""
    mine = "outside_losses:mine"
    offers = (f"mine = {mine}", f"dpo = {mine}", "broken = no_such_module:loss", "absent = outside_losses:absent")
    install("outside_losses", "def mine(terms, *, beta=1.0):\n    return terms\n", *offers)
    return tmp_path


def test_the_folders_are_listed() -> None:
    assert {"dpo", "ipo", "hinge"} <= set(plugins.names("objectives"))
    assert "sd" in plugins.names("families")
    assert not {"__init__", "base", "sampling", "loading"} & {*plugins.names("families"), *plugins.names("objectives")}


@pytest.mark.parametrize("kind", ["objectives", "families"])
def test_every_name_of_the_folders_can_be_loaded(kind: str) -> None:
    from flowalign.families.base import Family

    for name in plugins.names(kind):
        loaded = plugins.load(kind, name)
        if kind == "objectives":
            assert loaded.__name__ == name
            assert next(iter(inspect.signature(loaded).parameters)) == "terms"
        else:
            assert issubclass(loaded, Family)


def test_the_file_of_ours_and_of_nobody_elses(installed: Path) -> None:
    found = plugins.source("objectives", "dpo")
    assert found is not None
    assert found.is_file()
    assert plugins.source("objectives", "mine") is None
    assert plugins.source("families", "dpo") is None


def test_listing_imports_no_torch() -> None:
    lists = "plugins.names('objectives'), plugins.names('families')"
    code = f"import sys; from flowalign import plugins; {lists}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_installed_packages_add_names_but_do_not_replace_ours(installed: Path) -> None:
    assert {"mine", "broken", "dpo"} <= set(plugins.names("objectives"))
    assert len(plugins.names("objectives")) == len(set(plugins.names("objectives")))
    assert plugins.load("objectives", "mine")(3) == 3
    assert plugins.load("objectives", "dpo").__module__ == "flowalign.align.objectives.dpo"


@pytest.mark.parametrize("name", ["broken", "absent"])
def test_a_plugin_that_cannot_be_imported(installed: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*cannot be imported"):
        plugins.load("objectives", name)


@pytest.mark.parametrize("name", ["dop", "base", "__init__", "../dpo", ""])
def test_an_unknown_name_says_what_is_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed: .*dpo.*ipo"):
        plugins.load("objectives", name)


def test_an_unknown_kind_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'objectives'\? allowed: families, objectives"):
        plugins.names("objective")
    with pytest.raises(ConfigError, match="allowed: families, objectives"):
        plugins.load("trackers", "tensorboard")
