"""Configuration: checked once, and what it does not know is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.config import AdapterChoice, MergeConfig, parse_nbytes, read_recipe
from distmerge.errors import UsageError

KNOWN = dict.fromkeys(("base", "output", "max_shard_size", "memory_budget", "adapter", "dtype"), (str, int))


def recipe(tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "m.yaml").write_text(text)
    return read_recipe(tmp_path / "m.yaml", KNOWN)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("2GiB", 2 << 30),
        ("64 MiB", 64 << 20),
        ("1.5kb", 1500),
        ("0.5 KiB", 512),
        ("1TB", 10**12),
        ("3tib", 3 << 40),
        ("123", 123),
        ("  7B ", 7),
        ("10mb", 10**7),
    ],
)
def test_sizes_are_decimal_and_binary_where_they_say_so(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@given(st.integers(1, 1 << 50))
def test_a_number_of_bytes_is_itself(nbytes: int) -> None:
    assert parse_nbytes(str(nbytes)) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-1GB", "0", "0.0GB", "1e9", "5GB5", "1,5GB", "nan", "٣q"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_nbytes(text)


def test_a_recipe_gives_its_options_by_name(tmp_path: Path) -> None:
    text = "base: b\nmax-shard-size: 5GB\nadapter: [x, y]\n"
    assert recipe(tmp_path, text) == {"base": "b", "max_shard_size": "5GB", "adapter": ["x", "y"]}


@pytest.mark.parametrize("key", ["max_shard_nbytes", "max-shard-siz", "max-shard-sizes"])
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"unknown key '{key}'") as error:
        recipe(tmp_path, f"{key}: 1\n")
    assert error.value.hint == "did you mean 'max-shard-size'?"


def test_an_unknown_key_that_is_near_nothing_gets_no_advice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown key 'zzz'") as error:
        recipe(tmp_path, "zzz: 1\n")
    assert error.value.hint == ""


@pytest.mark.parametrize("text", ["base: a\nbase: b\n", "output: x\nadapter: {a: 1, a: 2}\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="stands twice"):
        recipe(tmp_path, text)


@pytest.mark.parametrize("spelling", [("max-shard-size", "max_shard_size"), ("memory_budget", "memory-budget")])
def test_a_key_that_stands_twice_in_two_spellings_is_refused(tmp_path: Path, spelling: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="twice"):
        recipe(tmp_path, "".join(f"{name}: {number}GB\n" for number, name in enumerate(spelling, start=1)))


@pytest.mark.parametrize(
    "text",
    [
        "base: !!python/object/apply:os.system [id]\n",
        "base: !custom x\n",
        "!!python/name:os.system\n",
        "base: [1, 2\n",
        "base: *nothing\n",
        "? [a]\n: b\n",
        "? {a: b}\n: c\n",
    ],
)
def test_tags_and_broken_yaml_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        recipe(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- a\n", "5\n", "text\n"])
def test_a_recipe_must_be_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="must be a mapping"):
        recipe(tmp_path, text)


def test_a_recipe_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml", KNOWN)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adapters": ()}, "no adapter"),
        ({"adapters": (AdapterChoice(folder=Path("a"), weight=0.0),)}, "weight"),
        ({"adapters": (AdapterChoice(folder=Path("a"), weight=float("nan")),)}, "weight"),
        ({"adapters": (AdapterChoice(folder=Path("a"), weight=float("inf")),)}, "weight"),
        ({"dtype": "int8"}, "dtype"),
        ({"nproc": 0}, "nproc"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": 1e10}, "timeout"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(fields: dict[str, Any], named: str) -> None:
    whole = {"base": Path("b"), "adapters": (AdapterChoice(folder=Path("a")),), "output": Path("o")}
    MergeConfig(**whole)
    with pytest.raises(UsageError, match=named):
        MergeConfig(**{**whole, **fields})
