"""Usage errors: exit 2, one message on stderr, nothing on stdout, nothing on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Inputs, Said


def assert_one_message(said: Said) -> None:
    assert said.out == ""
    assert said.err.lower().count("error:") == 1, said.err


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--adaptr", "x"), ("--adaptr", "--adapter")),
        (("--weight", "1", "--weight", "2"), ("1 adapter", "2 weights", "--weight")),
        (("--weight", "0"), ("0",)),
        (("--weight", "nan"), ("nan",)),
        (("--weight", "inf"), ("inf",)),
        (("--weight", "one"), ("one", "--weight")),
        (("--max-shard-size", "5 parsecs"), ("5 parsecs", "--max-shard-size", "5GB")),
        (("--max-shard-size", "0"), ("'0'",)),
        (("--max-shard-size", "-5GB"), ("-5GB",)),
        (("--memory-budget", ""), ("--memory-budget",)),
        (("--memory-budget", "nan"), ("nan",)),
        (("--memory-budget", "1e9"), ("1e9",)),
        (("--max-shard-size", "0.1"), ("0.1",)),
        (("--max-shard-size", "9" * 400), ("--max-shard-size",)),
        (("--dtype", "bf16"), ("bf16", "bfloat16")),
        (("--dtype", "int8"), ("int8", "bfloat16")),
        (("--nproc", "0"), ("0", "--nproc")),
        (("--nproc", "-1"), ("-1", "--nproc")),
        (("--nproc", "1.5"), ("1.5", "--nproc")),
        (("--nproc", "many"), ("many", "--nproc", "auto")),
        (("--nproc", "²"), ("²", "--nproc")),
        (("--device", "tpu"), ("'tpu'", "--device")),
        (("--device", ""), ("''", "--device")),
        (("--lora-alpha", "x"), ("x", "--lora-alpha")),
        (("--lora-alpha", "nan"), ("nan", "lora")),
        (("--lora-alpha", "0"), ("0", "lora")),
        (("--timeout", "0"), ("0", "timeout")),
        (("--timeout", "-1"), ("-1", "timeout")),
        (("--timeout", "nan"), ("nan", "timeout")),
        (("--timeout", "inf"), ("inf", "timeout")),
        (("stray",), ("stray",)),
        (("--overwrite=yes",), ("--overwrite",)),
        (("--config", "nowhere.yaml"), ("nowhere.yaml",)),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_a_wrong_option_is_refused_in_one_message(
    cli: Cli, inputs: Inputs, command: str, extra: tuple[str, ...], words: tuple[str, ...]
) -> None:
    said = cli(command, *inputs.folders, *extra, code=2)
    assert_one_message(said)
    for word in words:
        assert word in said.err, said.err
    assert list(inputs.output.parent.iterdir()) == []


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize("missing", ["--base", "--adapter", "--output"])
def test_a_missing_option_is_named(cli: Cli, inputs: Inputs, command: str, missing: str) -> None:
    at = inputs.folders.index(missing)
    said = cli(command, *inputs.folders[:at], *inputs.folders[at + 2 :], code=2)
    assert_one_message(said)
    assert missing in said.err


def test_a_device_that_is_not_there_is_a_usage_error(cli: Cli, inputs: Inputs) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    for command in ("merge", "plan"):
        said = cli(command, *inputs.folders, "--device", "cuda", code=2)
        assert_one_message(said)
        assert "'cuda'" in said.err
        assert "hint: " in said.err
    assert list(inputs.output.parent.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ("mrege",),
        ("verify",),
        ("verify", "a", "b"),
        ("verify", "out", "--base", "x"),
        ("verify", "out", "--adapter", "x"),
        ("verify", "out", "--weight", "2"),
        ("verify", "out", "--base", "b", "--adapter", "a", "--weight", "1", "--weight", "2"),
        ("verify", "out", "--strict"),
        ("verify", "out", "--depth", "deep"),
        ("verify", "out", "--depth", "full"),
        ("verify", "out", "--seed", "1"),
        ("verify", "out", "--base", "b", "--adapter", "a", "--depth", "digests"),
        ("verify", "out", "--base", "b", "--adapter", "a", "--sample-share", "0.5"),
        ("verify", "out", "--base", "b", "--adapter", "a", "--depth", "full", "--activations", "x"),
        ("verify", "out", "--base", "b", "--adapter", "a", "--depth", "sample", "--sample-share", "2"),
        ("inspect",),
        ("inspect", "a", "b"),
        ("demo", "--nproc", "0"),
        ("demo", "x"),
    ],
    ids=" ".join,
)
def test_other_commands_refuse_wrong_arguments_too(cli: Cli, args: tuple[str, ...]) -> None:
    assert_one_message(cli(*args, code=2))


def test_a_message_says_where_to_look_for_help(cli: Cli) -> None:
    assert "--help" in cli("merge", "--bogus", code=2).err


# -- exit code 3


def test_refused_inputs_exit_with_3_and_one_message(cli: Cli, inputs: Inputs, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for args in (
        ("merge", "--base", nowhere, "--adapter", inputs.adapter, "--output", inputs.output),
        ("merge", "--base", inputs.base, "--adapter", nowhere, "--output", inputs.output),
        ("merge", "--base", inputs.base, "--adapter", inputs.adapter, "--output", inputs.base),
        ("plan", "--base", nowhere, "--adapter", inputs.adapter, "--output", inputs.output),
        ("plan", "--base", inputs.base, "--adapter", inputs.adapter, "--output", inputs.base / "x"),
        ("plan", *inputs.folders, "--memory-budget", "1MB"),
        ("inspect", nowhere),
        ("inspect", tmp_path),
        ("verify", nowhere),
        ("verify", tmp_path),
        ("verify", inputs.base),
    ):
        said = cli(*args, code=3)
        assert_one_message(said)
        assert said.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_demo_never_replaces_a_folder_that_is_not_its_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    said = cli("demo", "--output", tmp_path, code=3)
    assert_one_message(said)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_demo_in_place_of_a_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = cli("demo", "--output", tmp_path / "file", code=3)
    assert_one_message(said)
