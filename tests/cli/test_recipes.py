"""Options, variables and recipes: the same names, one order of precedence, nothing unknown accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli, Inputs
from tests.cli.test_usage import assert_one_message


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def write(inputs: Inputs, **values: Any) -> Path:
    """A recipe (JSON is YAML) with the folders and `values`."""
    folders = {"base": str(inputs.base), "adapter": str(inputs.adapter), "output": str(inputs.output)}
    folder = inputs.output.parent / "recipes"
    folder.mkdir(exist_ok=True)
    return recipe(folder, json.dumps({**folders, **values}))


def plan(cli: Cli, *args: object, **variables: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(cli("plan", "--json", *args, **variables).out)
    return facts


# option, its value in the plan's facts, then values for: default, file, variable, option
LADDERS = [
    ("weight", lambda facts: facts["adapters"][0]["weight"], (1.0, 2.0, 3.0, 4.0)),
    ("nproc", lambda facts: facts["ranks"], (1, 2, 3, 4)),
    ("output", lambda facts: Path(facts["output"]).name, (None, "file", "variable", "option")),
]


@pytest.mark.parametrize(("name", "read", "values"), LADDERS, ids=[ladder[0] for ladder in LADDERS])
def test_option_over_variable_over_file_over_default(
    cli: Cli, inputs: Inputs, name: str, read: Any, values: tuple[Any, ...]
) -> None:
    default, in_file, in_variable, in_option = values
    file = write(inputs, **{name: in_file})
    variable = {f"DISTMERGE_{name.upper()}": str(in_variable)}
    if default is not None:
        assert read(plan(cli, "--config", write(inputs))) == default
    write(inputs, **{name: in_file})
    assert read(plan(cli, "--config", file)) == in_file
    assert read(plan(cli, "--config", file, **variable)) == in_variable
    assert read(plan(cli, "--config", file, f"--{name}", in_option, **variable)) == in_option


def test_dtype_and_shard_size_follow_the_same_order(cli: Cli, inputs: Inputs) -> None:
    file = write(inputs, **{"dtype": "float32", "max-shard-size": "100KB"})

    def written(*args: object, **variables: str) -> tuple[int, int]:
        facts = plan(cli, *args, **variables)
        return sum(kind["bytes_written"] for kind in facts["kinds"].values()), len(facts["files"])

    whole = written(*inputs.folders)
    from_file = written("--config", file)
    assert from_file[0] == 2 * whole[0]
    assert from_file[1] > 3
    one_file = written("--config", file, DISTMERGE_MAX_SHARD_SIZE="1GB", DISTMERGE_DTYPE="bfloat16")
    assert one_file == (whole[0], 1)
    last = written("--config", file, "--dtype", "float32", DISTMERGE_MAX_SHARD_SIZE="1GB", DISTMERGE_DTYPE="bfloat16")
    assert last == (2 * whole[0], 1)


def test_the_recipe_itself_may_come_from_a_variable(cli: Cli, inputs: Inputs) -> None:
    assert plan(cli, DISTMERGE_CONFIG=str(write(inputs, nproc=3)))["ranks"] == 3


def test_folders_may_come_from_variables(cli: Cli, inputs: Inputs) -> None:
    variables = {
        "DISTMERGE_BASE": str(inputs.base),
        "DISTMERGE_ADAPTER": f"{inputs.adapter}:{inputs.adapter}",
        "DISTMERGE_WEIGHT": "1 0.5",
        "DISTMERGE_OUTPUT": str(inputs.output),
    }
    assert [adapter["weight"] for adapter in plan(cli, **variables)["adapters"]] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ({}, [1.0]),
        ({"weight": 0.5}, [0.5]),
        ({"weight": [0.5]}, [0.5]),
        ({"weight": 2}, [2.0]),
        ({"adapter": ["A"]}, [1.0]),
        ({"adapter": ["A", "A"]}, [1.0, 1.0]),
        ({"adapter": ["A", "A"], "weight": [1, -0.25]}, [1.0, -0.25]),
    ],
    ids=str,
)
def test_adapters_and_weights_are_one_or_a_list(
    cli: Cli, inputs: Inputs, values: dict[str, Any], weights: list[float]
) -> None:
    if "adapter" in values:
        values = {**values, "adapter": [str(inputs.adapter)] * len(values["adapter"])}
    facts = plan(cli, "--config", write(inputs, **values))
    assert [adapter["weight"] for adapter in facts["adapters"]] == weights


@pytest.mark.parametrize("key", ["memory-budget", "memory_budget"])
@pytest.mark.parametrize("value", ["1GiB", 1 << 30, "1073741824"])
def test_dashes_and_underscores_sizes_as_text_and_numbers(cli: Cli, inputs: Inputs, key: str, value: Any) -> None:
    assert plan(cli, "--config", write(inputs, **{key: value}))["memory_per_rank"] <= 1 << 30


@pytest.mark.parametrize("name", ["json", "overwrite", "allow-zero-delta", "nproc", "timeout", "device", "lora-alpha"])
def test_every_option_may_stand_in_a_recipe(cli: Cli, inputs: Inputs, name: str) -> None:
    value = {"nproc": "auto", "timeout": 60, "device": "cpu", "lora-alpha": 3}.get(name, True)
    said = cli("plan", "--config", write(inputs, **{name: value}))
    if name == "json":
        assert json.loads(said.out)["ranks"] == 1


@pytest.mark.parametrize(
    ("key", "near"), [("adaptor", "adapter"), ("max_shard_nbytes", "max-shard-size"), ("dtypes", "dtype")]
)
def test_an_unknown_key_is_refused_with_the_nearest(cli: Cli, inputs: Inputs, key: str, near: str) -> None:
    said = cli("merge", "--config", write(inputs, **{key: "x"}), code=2)
    assert_one_message(said)
    assert repr(key) in said.err
    assert near in said.err.split("hint:")[1]
    assert "recipe.yaml" in said.err


@pytest.mark.parametrize("key", ["config", "help", "zzz", "", "as_json", "5"])
def test_keys_that_are_no_options_are_refused(cli: Cli, inputs: Inputs, key: str) -> None:
    said = cli("merge", "--config", write(inputs, **{key: "x"}), code=2)
    assert_one_message(said)
    assert "recipe.yaml" in said.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "mapping"),
        ("# only a comment\n", "mapping"),
        ("null", "mapping"),
        ("- base\n- adapter\n", "mapping"),
        ("base", "mapping"),
        ("5", "mapping"),
        ("base: a\nbase: b\n", "twice"),
        ("base: a\n'base': b\n", "twice"),
        ("dtype: float32\nadapter: {x: 1, x: 2}\n", "twice"),
        ("base: !!python/object/apply:os.system ['touch HERE']", "YAML"),
        ("base: !!python/object:pathlib.Path {}", "YAML"),
        ("base: !!python/name:os.system", "YAML"),
        ("base: !custom x", "YAML"),
        ("!!python/object:dict\nbase: x", "YAML"),
        ("base: [", "YAML"),
        ("base: 'x", "YAML"),
        ("\tbase: x", "YAML"),
        ("base: *nowhere", "YAML"),
        ("base: x\n---\nbase: y\n", "YAML"),
        ("base: \x00", "YAML"),
        ("[" * 5000, "YAML"),
        ("? [a]\n: b\n", "recipe.yaml"),
        ("? {a: b}\n: c\n", "recipe.yaml"),
        ("5: x\n", "'5'"),
        ("<<: {base: x}\n", "recipe.yaml"),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_recipe_that_is_no_plain_mapping_is_refused(cli: Cli, tmp_path: Path, text: str, words: str) -> None:
    file = recipe(tmp_path, text.replace("HERE", str(tmp_path / "evil")))
    said = cli("merge", "--config", file, code=2)
    assert_one_message(said)
    assert "recipe.yaml" in said.err
    assert words in said.err, said.err
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("data", [b"\xff\xfe\xff", b"base: \xff"])
def test_a_recipe_that_is_no_text_is_refused(cli: Cli, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(data)
    assert_one_message(cli("merge", "--config", tmp_path / "recipe.yaml", code=2))


def test_a_recipe_that_is_not_there_or_a_folder_is_refused(cli: Cli, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        said = cli("merge", "--config", path, code=2)
        assert_one_message(said)
        assert str(path) in said.err


WRONG = [
    *[("base", value) for value in (5, 1.5, True, ["a"], {"a": "b"}, [])],
    *[("output", value) for value in (5, True, ["a"], {"a": "b"})],
    *[("adapter", value) for value in (5, {"a": "b"}, [[]], [None], [5], [], [["a"]])],
    *[("weight", value) for value in ("x", ["x"], [[1]], {"a": 1}, [None], True, [True], 0, [0], float("nan"))],
    *[("dtype", value) for value in (5, "bf16", ["float32"], {"a": 1}, True)],
    *[("nproc", value) for value in (0, -1, 1.5, True, "x", [2], {"a": 1})],
    *[("device", value) for value in (5, ["cpu"], {"a": 1}, True)],
    *[("memory-budget", value) for value in (0, -1, True, "x", [1], {"a": 1}, 0.5, float("nan"), float("inf"))],
    *[("max-shard-size", value) for value in (0, -1, True, "x", [1], {"a": 1}, 0.5)],
    *[("lora-alpha", value) for value in ("x", [3], {"a": 1}, True)],
    *[("timeout", value) for value in (0, -1, "x", [3], {"a": 1}, True)],
    *[("overwrite", value) for value in ("maybe", [True], {"a": 1}, 2)],
    *[("allow-zero-delta", value) for value in ("maybe", 2)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_value_of_another_type_is_a_usage_error(cli: Cli, inputs: Inputs, name: str, value: Any) -> None:
    said = cli("plan", "--config", write(inputs, **{name: value}), code=2)
    assert_one_message(said)
    assert name in said.err or name.replace("-", "_") in said.err


@pytest.mark.parametrize("name", ["weight", "adapter", "base", "output"])
def test_null_is_the_same_as_not_given(cli: Cli, inputs: Inputs, name: str) -> None:
    file = write(inputs, **{name: None})
    if name == "weight":
        assert plan(cli, "--config", file)["adapters"][0]["weight"] == 1.0
    else:
        said = cli("plan", "--config", file, code=2)
        assert_one_message(said)
        assert f"--{name}" in said.err


def test_a_folder_named_like_a_date_or_a_number_is_a_folder_or_refused_in_words(cli: Cli, tmp_path: Path) -> None:
    for text in ("output: 2024-01-01", "output: 2024"):
        said = cli("plan", "--config", recipe(tmp_path, f"base: x\nadapter: y\n{text}\n"), code=2)
        assert_one_message(said)
        assert "output" in said.err


def test_a_recipe_of_many_aliases_is_refused_in_a_short_message(cli: Cli, tmp_path: Path) -> None:
    lines = ["a: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 21)]
    said = cli("plan", "--config", recipe(tmp_path, "\n".join([*lines, "dtype: *a20"])), code=2)
    assert_one_message(said)
    assert len(said.err) < 2000
