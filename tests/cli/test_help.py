"""Help: there for every command, with an example, and paid for by nobody who does not merge."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from distmerge.cli.main import cli as group
from tests.conftest import environment

COMMANDS = ("merge", "plan", "verify", "evaluate", "inspect", "demo")


def test_all_commands_of_the_contract_are_there() -> None:
    assert set(COMMANDS) <= set(group.commands)


@pytest.mark.parametrize("args", [("--help",), ("-h",), ("--version",), *((name, "--help") for name in COMMANDS)])
def test_help_imports_neither_torch_nor_rich_nor_yaml(args: tuple[str, ...]) -> None:
    program = (
        "import sys; from distmerge.cli.main import main\n"
        f"sys.argv = ['distmerge', *{args!r}]\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'rich', 'yaml', 'numpy', 'safetensors', 'transformers', 'huggingface_hub'}"
        " & sys.modules.keys()), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=60)
    assert done.stderr == "[]\n"
    assert done.stdout


@pytest.mark.parametrize("name", group.commands)
def test_every_command_has_help_with_an_example(cli, name: str) -> None:
    said = cli(name, "--help")
    assert said.err == ""
    assert re.search(rf"Examples?:\n +(distmerge|torchrun .* distmerge) {name}", said.out), said.out


@pytest.mark.parametrize("name", group.commands)
def test_every_option_says_what_it_does(name: str) -> None:
    for parameter in group.commands[name].params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


def test_plan_has_the_options_of_merge() -> None:
    merge, plan = ({option for p in group.commands[name].params for option in p.opts} for name in ("merge", "plan"))
    assert merge == plan


def test_every_option_that_decides_the_output_has_a_variable_of_its_name() -> None:
    for parameter in group.commands["merge"].params:
        name = parameter.opts[0].removeprefix("--")
        assert parameter.envvar == "DISTMERGE_" + name.replace("-", "_").upper()


def test_the_exit_codes_are_in_the_help(cli) -> None:
    text = cli("--help").out
    for code in (0, 1, 2, 3, 4, 5, 75):
        assert re.search(rf"\b{code}\b", text)


def test_the_version_is_the_packages(cli) -> None:
    import distmerge

    assert distmerge.__version__ in cli("--version").out


def test_no_command_at_all_shows_the_help(cli) -> None:
    said = cli(code=2)
    assert "merge" in said.out + said.err
