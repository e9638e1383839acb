"""Names without transformers: as they are, by the user's rules, by one table for the whole adapter, or not at all."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from distmerge.adapter.naming.tables import Renaming, Rule, apply_rules, parse_rules, rename
from distmerge.errors import InputError, UsageError
from tests import models
from tests.conftest import environment

CLIP_MODELS = ("llava", "llava_next", "gemma3", "paligemma")
VLMS = (*CLIP_MODELS, "mistral3", "mllama", "qwen2_vl", "qwen2_5_vl")
Disk = Callable[..., list[str]]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """The names of the tensors that transformers saves for a model."""
    made: dict[tuple[str, bool], list[str]] = {}

    def get(name: str, original: bool = True) -> list[str]:
        if (name, original) not in made:
            folder = models.save(name, tmp_path_factory.mktemp(name), original=original)
            made[name, original] = list(load_file(folder / "model.safetensors"))
        return made[name, original]

    return get


def renamed(paths: list[str], names: list[str], *rules: str) -> Renaming | None:
    return rename(paths, set(names).__contains__, parse_rules(rules))


def assert_renamed(paths: list[str], names: list[str], table: str | None = None) -> None:
    """All of `paths` lead to all of `names`, in the order of both; whatever part of an adapter is looked at."""
    for step in (1, 2, 3):
        found = renamed(paths[::step], names)
        assert found is not None
        assert found.paths == dict(zip(paths[::step], names[::step], strict=True))
        assert [found.apply(path) for path in paths[::step]] == names[::step]
    if table is not None:
        found = renamed(paths, names)
        assert found is not None
        assert found.name == table


@pytest.mark.parametrize("name", ["llama", *VLMS])
def test_names_that_are_on_disk_stay(disk: Disk, name: str) -> None:
    names = disk(name)
    assert renamed(names, names) == Renaming(name="", paths={path: path for path in names}, rules=())


@pytest.mark.parametrize("name", VLMS)
def test_names_of_modules_and_of_old_checkpoints_lead_to_each_other(disk: Disk, name: str) -> None:
    old, new = disk(name), disk(name, False)
    pairs = dict(zip(sorted(old, key=_tail), sorted(new, key=_tail), strict=True))
    assert old != new
    assert_renamed(list(pairs.values()), list(pairs.keys()))
    assert_renamed(list(pairs.keys()), list(pairs.values()))


def _tail(name: str) -> list[str]:
    known = ("model.", "language_model.", "model.language_model.", "language_model.model.", "model.visual.", "visual.")
    tower = "tower" * ("vision" in name or "visual" in name)
    return [tower, re.sub("|".join(map(re.escape, sorted(known, key=len, reverse=True))), "", name)]


@pytest.mark.parametrize("name", CLIP_MODELS)
def test_the_vision_model_inside_of_a_tower_comes_and_goes(disk: Disk, name: str) -> None:
    def inside(names: list[str]) -> list[str]:
        return [path.replace("vision_tower.", "vision_tower.vision_model.") for path in names]

    old, new = (
        sorted(
            (path.replace("vision_tower.vision_model.", "vision_tower.") for path in disk(name, original)), key=_tail
        )
        for original in (True, False)
    )
    hub, between = inside(old), inside(new)
    assert_renamed(new, hub, "LLaVA v5 -> v4, with vision_model")
    assert_renamed(between, hub, "LLaVA v5 -> v4")
    assert_renamed(between, old, "LLaVA v5 -> v4, without vision_model")
    assert_renamed(old, between, "LLaVA v4 -> v5, with vision_model")
    assert_renamed(hub, between, "LLaVA v4 -> v5")
    assert_renamed(hub, new, "LLaVA v4 -> v5, without vision_model")
    assert_renamed(between, new, "without vision_model")
    assert_renamed(new, between, "with vision_model")
    assert_renamed(hub, old, "without vision_model")
    assert_renamed(old, hub, "with vision_model")


@pytest.mark.parametrize(("name", "gate"), [("mixtral", "gate"), ("phimoe", "router")])
def test_the_router_of_a_mixture_is_found_among_old_and_new_names(disk: Disk, name: str, gate: str) -> None:
    def adapted(names: list[str]) -> list[str]:
        return sorted(
            path for path in names if re.search(r"self_attn.*proj\.weight|moe\.gate|mlp\.(gate|router)", path)
        )

    old, new = adapted(disk(name)), adapted(disk(name, False))
    assert f"model.layers.0.mlp.{gate}.weight" in new
    if old == new:
        pytest.skip("this transformers has no old names for it")
    old.sort(key=lambda path: ("moe" in path, path))
    new.sort(key=lambda path: ("mlp" in path, path))
    assert_renamed(new, old)
    assert_renamed(old, new)


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama", "llama4", "qwen3_vl", "qwen2_vl", "mistral3"])
@pytest.mark.parametrize("original", [True, False], ids=["original", "modules"])
def test_an_adapter_of_the_text_model_alone_fits_its_vision_language_model(
    disk: Disk, name: str, original: bool
) -> None:
    names = [
        path for path in disk(name, original) if re.search(r"(?<!vision_model)\.layers\..*self_attn|lm_head", path)
    ]
    names = [path for path in names if not path.startswith(("vision", "model.vision", "visual", "model.visual"))]
    text = [re.sub(r"^(model\.language_model\.|language_model\.(model\.)?)", "model.", path) for path in names]
    text = [path.replace("model.lm_head", "lm_head") for path in text]
    assert len(text) > 4
    assert all(path.startswith(("model.layers.", "lm_head")) for path in text)
    assert_renamed(text, names)
    assert_renamed(names, text)


@pytest.mark.parametrize("prefix", ["model", "transformer", "gpt_neox"])
def test_a_bare_backbone_is_found_with_and_without_its_prefix(prefix: str) -> None:
    bare = ["layers.0.q_proj.weight", "wte.weight", "norm"]
    full = [f"{prefix}.{path}" for path in bare]
    assert_renamed(bare, full, f"add {prefix}.")
    assert_renamed(full, bare, f"strip {prefix}.")
    assert_renamed([*bare, "lm_head.weight"], [*full, "lm_head.weight"], f"add {prefix}.")


@pytest.mark.parametrize("parameter", [True, False], ids=["parameter", "module"])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("lm_head", "language_model.lm_head"),
        ("model.layers.1.mlp.gate", "model.layers.1.block_sparse_moe.gate"),
        ("model.layers.1.mlp.router", "model.layers.1.block_sparse_moe.gate"),
    ],
)
def test_a_path_may_be_of_a_module_or_of_a_parameter(path: str, name: str, parameter: bool) -> None:
    ending = ".weight" * parameter
    assert_renamed([path + ending], [name + ending])
    assert renamed([f"{path}_x{ending}"], [f"{name}_x{ending}"]) is None


def test_a_table_that_does_not_fit_the_whole_adapter_does_not_count() -> None:
    names = ["language_model.model.layers.0.up_proj", "language_model.model.layers.1.up_proj"]
    paths = ["model.language_model.layers.0.up_proj", "model.language_model.layers.1.up_proj"]
    assert renamed(paths, names) is not None
    assert renamed(paths, names[:1]) is None
    assert renamed([paths[0], names[1], "model.visual.x"], [*names, "visual.x"]) is None


def test_two_paths_never_become_one() -> None:
    assert renamed(["model.layers.0.x"], ["layers.0.x"]) is not None
    assert renamed(["layers.0.x", "model.layers.0.x"], ["layers.0.x"]) is None


def test_tables_that_disagree_are_refused_with_their_names() -> None:
    with pytest.raises(InputError) as caught:
        renamed(["model.language_model.a"], ["language_model.model.a", "model.a"])
    for part in ("LLaVA v5 -> v4", "Qwen2-VL v5 -> v4", "'language_model.model.a'", "'model.a'", "--map"):
        assert part in str(caught.value)


def test_tables_that_agree_are_not_refused() -> None:
    found = renamed(["model.visual.a"], ["visual.a"])
    assert found is not None
    assert found.paths == {"model.visual.a": "visual.a"}


def test_rules_apply_to_every_path_in_their_order() -> None:
    names = ["b.0.x", "b.1.x"]
    found = renamed(["a.0.x", "a.1.x"], names, r"^a\.(\d)=>c.\1", "c=>b")
    assert found is not None
    assert found.paths == {"a.0.x": "b.0.x", "a.1.x": "b.1.x"}
    assert found.name == "--map"
    assert found.apply("a.2.x") == "b.2.x"
    assert renamed(["a.0.x", "a.1.x"], names, "c=>b", r"^a\.(\d)=>c.\1") is None


def test_a_rule_is_obeyed_where_names_would_stand_as_they_are() -> None:
    found = renamed(["layers.0"], ["layers.0", "layers.1"], "0=>1")
    assert found is not None
    assert found.paths == {"layers.0": "layers.1"}


def test_a_rule_that_changes_nothing_is_not_named() -> None:
    found = renamed(["a"], ["a"], "b=>c")
    assert found is not None
    assert found.name == ""


def test_a_table_may_follow_the_rules() -> None:
    found = renamed(["x.model.language_model.a"], ["language_model.model.a"], r"^x\.=>")
    assert found is not None
    assert found.paths == {"x.model.language_model.a": "language_model.model.a"}
    assert found.name == "--map, LLaVA v5 -> v4"
    assert found.apply("x.lm_head") == "language_model.lm_head"


def test_rules_that_make_two_paths_one_are_refused() -> None:
    with pytest.raises(InputError, match=r"--map: makes 'layers' of both 'layers\.0' and 'layers\.1'"):
        apply_rules(["layers.0", "layers.1"], parse_rules([r"\.\d=>"]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not of the form"),
        ("model.", "not of the form"),
        ("model.=x", "not of the form"),
        ("=>x", "not of the form"),
        ("a=>b=>c", "twice"),
        ("(=>x", "cannot be used: missing"),
        ("a{99999999999999}=>x", "cannot be used"),
        (r"a=>\1", "invalid group reference"),
        (r"a=>\g<name>", "unknown group"),
        (r"a=>\q", "bad escape"),
        ("a" * 1001 + "=>x", "1004 characters"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused_and_shown(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rules(["fine=>x", text])
    assert reason in caught.value.what
    assert caught.value.where.startswith("--map '")
    assert len(caught.value.where) < 220


def test_a_replacement_may_be_empty_and_a_pattern_may_hold_an_equals_sign() -> None:
    assert parse_rules(["a=b=>"]) == (Rule(pattern=re.compile("a=b"), replacement=""),)


def test_a_rule_that_takes_for_ever_is_ended() -> None:
    with pytest.raises(InputError, match="--map: matching its patterns takes more than"):
        apply_rules(["a" * 60], parse_rules(["(a|a)*b=>x"]))


@given(st.lists(st.text(max_size=12), max_size=4), st.lists(st.text(max_size=12), max_size=4))
def test_what_is_returned_is_known_and_complete(paths: list[str], names: list[str]) -> None:
    found = renamed(paths, names)
    if all(path in names for path in paths):
        assert found is not None
        assert found.name == ""
    if found is not None:
        assert list(found.paths) == list(dict.fromkeys(paths))
        assert set(found.paths.values()) <= set(names)


@pytest.mark.parametrize("module", ["tables", "slots", "boxes", "conversion"])
def test_names_are_resolved_before_torch_is_imported(module: str, tmp_path: Path) -> None:
    heavy = "[n for n in ('torch', 'transformers') if n in sys.modules]"
    code = f"import sys, distmerge.adapter.naming.{module}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "[]\n"
