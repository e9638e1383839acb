"""adapter_config.json is read by PEFT's rules: PEFT's own functions say what is right."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from distmerge.adapter.patterns import PatternTable
from distmerge.adapter.peft_config import PeftConfig, read_config
from distmerge.errors import InputError

WORDS = ["model", "layers", "experts", "h", "self_attn", "q_proj", "k_proj", "proj", "lm_head", "0", "1", "2", "11"]
MODULES = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(".".join),
    st.builds(
        "{}{}.{}.{}{}".format,
        st.sampled_from(["model.", "", "base.model."]),
        st.sampled_from(["layers", "h"]),
        st.integers(0, 2),
        st.sampled_from(["", "experts.0.", "experts.1.", "self_attn.", "h.2."]),
        st.sampled_from(["q_proj", "k_proj"]),
    ),
)
_EXPRESSIONS = [
    *(".*proj", "q|k_proj", "(q|k)_proj", r"layers\.\d\..*", "^model.*", "^q_proj", "layers.1", r".*\.1\..*_proj"),
    *("proj$", "[qk]_proj", "model.layers.(0|1).self_attn.q_proj", r"h\.\d+", "(?:model.)?lm_head", "", "."),
]
PATTERNS = st.one_of(MODULES, st.sampled_from(_EXPRESSIONS))
LISTS = st.lists(st.sampled_from(["q_proj", "k_proj", "self_attn.q_proj", "proj", "lm_head", "0", "h"]), max_size=4)
LAYERS = st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=3))
_PLAIN_LAYERS = [None, [], "", "layers", "h", ["layers"], ["h", "layers"], ["layers", "experts"], ["experts", "layers"]]
LAYERS_PATTERNS = st.sampled_from([*_PLAIN_LAYERS, "(layers|h)", ["(h|experts)"], "[a-z]+"])


def written(folder: Path, **fields: Any) -> PeftConfig:
    """What distmerge reads of a configuration that PEFT could have saved."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **fields}
    return read_config(json.loads(json.dumps(config)), str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@example(patterns={"q_proj": 2, ".*proj": 3, "self_attn.q_proj": 4}, module="model.layers.0.self_attn.q_proj")
@given(patterns=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4), module=MODULES)
def test_the_first_matching_alpha_pattern_counts_as_in_peft(
    folder: Path, patterns: dict[str, int], module: str
) -> None:
    config = written(folder, alpha_pattern=patterns)
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), 6)
    assert config.matching_alphas(module)[0] == alpha
    assert config.scaling(module, 5) == alpha / 5


@given(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4), MODULES)
def test_the_first_matching_rank_pattern_counts_as_in_peft(folder: Path, patterns: dict[str, int], module: str) -> None:
    config = written(folder, rank_pattern=patterns)
    assert config.matching_ranks(module)[0] == patterns.get(get_pattern_key(patterns.keys(), module), 4)


@given(st.one_of(LISTS, PATTERNS), st.one_of(st.none(), LISTS, PATTERNS), MODULES)
def test_modules_are_targeted_and_excluded_as_in_peft(
    folder: Path, targets: str | list[str], excluded: str | list[str] | None, module: str
) -> None:
    ours = written(folder, target_modules=targets, exclude_modules=excluded)
    theirs = PeftLoraConfig(target_modules=targets, exclude_modules=excluded)
    assert ours.targets(module) == bool(check_target_module_exists(theirs, module))


@settings(max_examples=400)
@given(st.sampled_from([["q_proj"], ["q_proj", "k_proj"], ["self_attn.q_proj"]]), LAYERS, LAYERS_PATTERNS, MODULES)
def test_layers_are_chosen_as_in_peft(
    folder: Path, targets: list[str], layers: int | list[int] | None, pattern: str | list[str] | None, module: str
) -> None:
    if pattern and not layers and layers != 0:
        layers = [1]  # PEFT refuses a pattern without layers
    ours = written(folder, target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
    theirs = PeftLoraConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
    assert ours.targets(module) == bool(check_target_module_exists(theirs, module))


@pytest.mark.parametrize(
    ("fields", "module", "targeted"),
    [
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj", True),
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.xq_proj", False),
        ({"target_modules": "q_proj"}, "model.layers.0.self_attn.q_proj", False),
        ({"target_modules": r".*\.1\..*_proj"}, "model.layers.1.mlp.up_proj", True),
        ({"target_modules": "all-linear"}, "lm_head", True),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "model.layers.0.self_attn.q_proj", False),
        ({"layers_to_transform": [1]}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": 0}, "model.layers.1.self_attn.q_proj", False),
        ({"layers_to_transform": [1]}, "model.layers.1.experts.0.q_proj", True),
        ({"layers_to_transform": [0], "layers_pattern": "experts"}, "model.layers.1.experts.0.q_proj", True),
        ({"layers_to_transform": [1], "layers_pattern": ["layers", "experts"]}, "m.layers.1.experts.0.q_proj", True),
        ({"layers_to_transform": [1], "layers_pattern": "(layers|h)"}, "m.layers.1.q_proj", True),
    ],
)
def test_these_modules_are_targeted(folder: Path, fields: dict[str, Any], module: str, targeted: bool) -> None:
    assert written(folder, **fields).targets(module) is targeted


@pytest.mark.parametrize(("r", "alpha", "rslora"), [(4, 6, False), (16, 5, True), (7, 0.5, True), (64, -16, False)])
def test_scaling_is_that_of_peft(folder: Path, r: int, alpha: float, rslora: bool) -> None:
    ours = written(folder, r=r, lora_alpha=alpha, use_rslora=rslora, alpha_pattern={"k_proj": 3})
    assert ours.scaling("model.q_proj", r) == (alpha / math.sqrt(r) if rslora else alpha / r)
    assert ours.scaling("model.k_proj", 2 * r) == (3 / math.sqrt(2 * r) if rslora else 3 / (2 * r))


def test_every_field_that_peft_writes_for_plain_lora_is_accepted(tmp_path: Path) -> None:
    config = PeftLoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    read = read_config(json.loads((tmp_path / "adapter_config.json").read_text()), str(tmp_path))
    assert (read.r, read.lora_alpha, read.target_modules) == (3, 5.0, ("q_proj",))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(", "*", "[a", "(?i)q_proj", "(?P<x>a)(?P<x>b)"])
def test_a_pattern_that_is_no_regular_expression_is_refused(folder: Path, field: str, pattern: str) -> None:
    with pytest.raises(InputError, match=field):
        written(folder, **{field: {pattern: 2}})


@pytest.mark.parametrize("pattern", ["(", ["("], ["layers", "*"]], ids=str)
def test_a_layers_pattern_that_is_no_regular_expression_is_refused(folder: Path, pattern: str | list[str]) -> None:
    with pytest.raises(InputError, match="layers_pattern"):
        written(folder, layers_to_transform=[1], layers_pattern=pattern)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"bias": "some"}, "bias"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"modules_to_save": [1]}, "modules_to_save"),
        ({"init_lora_weights": "corda"}, "--initial-adapter"),
        ({"init_lora_weights": "lora_ga"}, "--initial-adapter"),
        ({"init_lora_weights": "loftq"}, "the base that LoftQ saved"),
        ({"init_lora_weights": "unheard_of"}, "init_lora_weights"),
        ({"layer_replication": [[2, 1]]}, "layer_replication"),
        ({"layer_replication": [[0, "1"]]}, "layer_replication"),
        ({"target_parameters": [1]}, "target_parameters"),
        ({"use_some_new_variant": True}, "use_some_new_variant"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 0}, "r must"),
        ({"r": True}, "r must"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"target_modules": [1]}, "target_modules"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "UNHEARD_OF"}, "UNHEARD_OF"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(folder: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        written(folder, **fields)
    assert named in f"{caught.value.what} {caught.value.hint}"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


_KEYS = st.text("ab.q_1|*", max_size=6).filter(_compiles)


@settings(max_examples=500)
@example(patterns={"q": 1, "a.q": 2, "a_q": 3, "1": 4, "a.": 5, ".q": 6}, module="b.a_q")
@given(patterns=st.dictionaries(_KEYS, st.integers(1, 64), max_size=6), module=st.text("ab.q_1", max_size=10))
def test_a_table_of_patterns_gives_what_matching_each_in_turn_gives(patterns: dict[str, int], module: str) -> None:
    matching = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
    assert PatternTable(patterns).values(module) == matching
