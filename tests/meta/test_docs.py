"""Documents that cannot drift: the command line's page, promises and their tests, links, recipes, versions."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

from distmerge import __version__
from distmerge.cli.main import cli
from distmerge.cli.options import recipe_types
from distmerge.config import read_recipe
from distmerge.numerics.tuners import LOW_RANK, OPERATORS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])


def test_the_command_line_page_is_what_help_says() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run `make docs`"


def test_the_page_on_formats_is_what_the_registries_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_formats.py"))["page"]()
    assert (ROOT / "docs" / "formats.md").read_text() == made, "run `make docs`"
    cells = {cell.strip() for line in made.splitlines() for cell in line.split("|")}
    assert not {*OPERATORS, *LOW_RANK} - cells, "every operator has a line"


@pytest.mark.parametrize("name", ["performance.md", "log.md"])
def test_the_figures_on_performance_are_those_of_the_raw_logs(name: str) -> None:
    filled = runpy.run_path(str(ROOT / "docs" / "make_performance.py"))["filled"]
    text = (ROOT / "docs" / name).read_text()
    assert text == filled(text), "run `make docs`"


def test_every_promise_names_a_test_that_exists() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    promises = (ROOT / "docs" / "guarantees.md").read_text().split("## Promised")[1].split("## Not promised")[0]
    names = re.findall(r"`(test_\w+)`", promises)
    assert len(names) >= 7
    assert [name for name in names if f"def {name}(" not in sources] == []
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", promises, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_each_of_the_ninety_bad_inputs_names_tests_that_exist() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    page = (ROOT / "docs" / "inputs.md").read_text()
    assert [name for name in re.findall(r"`(test_\w+)`", page) if f"def {name}(" not in sources] == []
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| [^|]+ \| `test_\w+`[^|]*\|$", page, re.MULTILINE)
    assert list(map(int, rows)) == list(range(1, 91))
    fuzzed = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", page.split("## Fuzzing")[1], re.MULTILINE)))
    )
    assert fuzzed == {path.name for path in (ROOT / "fuzz" / "corpus").iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_hold_known_options_and_begin_with_their_command(recipe: Path) -> None:
    known = recipe_types(cli.commands["merge"])
    assert {"base", "adapter", "output"} <= read_recipe(recipe, known).keys()
    assert recipe.read_text().startswith(f"# distmerge merge --config configs/{recipe.name}\n")
    assert isinstance(yaml.safe_load(recipe.read_text()), dict)


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == __version__


def test_launch_scripts_are_valid_shell_and_say_what_they_do() -> None:
    for script in sorted((ROOT / "launch").glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)
        lines = script.read_text().splitlines()
        assert lines[1].startswith("# "), script
        assert "set -euo pipefail" in lines
        assert len(lines) <= 40
