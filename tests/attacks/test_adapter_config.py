"""adapter_config.json of a LoRA: what would change the arithmetic and is not understood is refused by field."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import distmerge
from distmerge.adapter.peft_config import REFUSED_FIELDS
from distmerge.adapter.tuners.fields import FIELDS
from distmerge.adapter.tuners.registry import TUNERS, UNMERGEABLE
from distmerge.errors import InputError
from distmerge.inspection import inspect
from tests.attacks.scene import Scene, failure
from tests.factories import edit_json, load_folder, write_adapter, write_base


@pytest.mark.parametrize(
    "value", [0, 0.0, float("nan"), float("inf"), -float("inf"), "8", "", None, True, False, [8], {"a": 1}]
)
def test_a_lora_alpha_that_is_no_number_is_refused_and_replaceable(scene: Scene, value: Any) -> None:
    scene.spoil_config(lora_alpha=value)
    scene.refuse("adapter_config.json", "lora_alpha", repr(value), hint="--lora-alpha")
    distmerge.plan(scene.config(lora_alpha=6.0))


def test_a_lora_alpha_beyond_floats_is_refused(scene: Scene) -> None:
    path = scene.adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6', f'"lora_alpha": {10**400}'))
    assert json.loads(path.read_text())["lora_alpha"] == 10**400
    scene.refuse("adapter_config.json", "lora_alpha")


def test_a_missing_lora_alpha_is_refused(scene: Scene) -> None:
    scene.drop_config("lora_alpha")
    scene.refuse("adapter_config.json", "lora_alpha", hint="--lora-alpha")


@pytest.mark.parametrize("value", [0, -1, 4.5, 4.0, "8", True, None, [4]])
def test_an_r_that_is_no_positive_integer_is_refused(scene: Scene, value: Any) -> None:
    scene.spoil_config(r=value)
    scene.refuse("adapter_config.json", "r must be", repr(value))


@pytest.mark.parametrize("r", [3, 5, 10**30])
def test_an_r_that_the_factors_contradict_is_refused(scene: Scene, r: int) -> None:
    scene.spoil_config(r=r)
    scene.refuse("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", "r 4", r)


@pytest.mark.parametrize("value", [0, -1, True, "8", float("nan"), None])
def test_values_of_rank_pattern_are_checked(scene: Scene, value: Any) -> None:
    scene.spoil_config(rank_pattern={"q_proj": value})
    scene.refuse("adapter_config.json", "rank_pattern", repr(value))


@pytest.mark.parametrize("value", [0, True, "8", float("nan"), float("inf"), None, []])
def test_values_of_alpha_pattern_are_checked(scene: Scene, value: Any) -> None:
    scene.spoil_config(alpha_pattern={"q_proj": value})
    scene.refuse("adapter_config.json", "alpha_pattern", repr(value))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a", "x" * 5000])
def test_a_pattern_that_is_no_regular_expression_is_refused(scene: Scene, field: str, pattern: str) -> None:
    scene.spoil_config(**{field: {pattern: 4}})
    scene.refuse("adapter_config.json", field)


@pytest.mark.parametrize("value", ["q_proj", ["q_proj"], 4, True])
def test_a_pattern_field_that_is_no_object_is_refused(scene: Scene, value: Any) -> None:
    scene.spoil_config(rank_pattern=value)
    scene.refuse("adapter_config.json", "rank_pattern", "object")


SLOW_PATTERN = "((.*)*)*z"


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {SLOW_PATTERN: 4}},
        {"alpha_pattern": {SLOW_PATTERN: 4}},
        {"target_modules": SLOW_PATTERN},
        {"exclude_modules": SLOW_PATTERN},
        {"layers_pattern": SLOW_PATTERN, "layers_to_transform": [0]},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.timeout(60)
def test_a_pattern_that_takes_exponential_time_does_not_hang(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr("distmerge.adapter.patterns._SECONDS", 0.3)
    scene.spoil_config(**fields)
    for call in (lambda: inspect(scene.adapter), lambda: distmerge.plan(scene.config())):
        error = failure(call)
        assert error is None or isinstance(error, InputError)
    scene.refuse("CPU time")


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha_pattern": {SLOW_PATTERN: 4}},
        {"target_modules": SLOW_PATTERN},
        {"layers_pattern": SLOW_PATTERN, "layers_to_transform": [0]},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.timeout(60)
def test_in_a_thread_a_pattern_takes_no_longer_and_stops_nobody(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr("distmerge.adapter.patterns._SECONDS", 0.3)
    scene.spoil_config(**fields)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: failure(lambda: distmerge.plan(scene.config())))
        turns = 0
        while not asked.done():
            time.sleep(0.01)  # another thread gets its turn all the while
            turns += 1
        error = asked.result()
    assert isinstance(error, InputError)
    assert "CPU time" in str(error)
    assert turns > 5


def test_in_a_thread_patterns_mean_what_they_mean_elsewhere(scene: Scene) -> None:
    scene.spoil_config(
        alpha_pattern={".*(q|down)_proj": 8, "layers.1.*": 12},
        rank_pattern={"mlp.*": 4},
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1],
        layers_pattern="layers?",
    )
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(distmerge.plan, scene.config()).result() == distmerge.plan(scene.config())


@pytest.mark.parametrize("value", [*sorted(UNMERGEABLE), "lora", "LORA ", "QUX", "", None, 5, True, ["LORA"], {}])
def test_a_peft_type_that_is_not_understood_is_refused(scene: Scene, value: Any) -> None:
    scene.spoil_config(peft_type=value)
    scene.refuse("adapter_config.json", "peft_type", repr(value))


@pytest.mark.parametrize("value", sorted(TUNERS))
def test_factors_of_a_lora_under_another_tuners_name_are_refused(scene: Scene, value: str) -> None:
    scene.spoil_config(peft_type=value)
    scene.refuse(scene.adapter)
    path = scene.adapter / "adapter_config.json"
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key in FIELDS[value]}))
    scene.refuse("adapter_model.safetensors", "model.layers.0.mlp.down_proj", "lora_A.weight")


def test_a_missing_peft_type_is_refused(scene: Scene) -> None:
    scene.drop_config("peft_type")
    scene.refuse("adapter_config.json", "peft_type")


@pytest.mark.parametrize("field", sorted(REFUSED_FIELDS))
@pytest.mark.parametrize("value", [True, ["x"], {"x": 1}], ids=str)
def test_every_unsupported_field_is_refused_by_name(scene: Scene, field: str, value: Any) -> None:
    scene.spoil_config(**{field: value})
    scene.refuse("adapter_config.json", f"{field} is set")


@pytest.mark.parametrize("field", sorted(REFUSED_FIELDS))
@pytest.mark.parametrize("value", [None, False], ids=str)
def test_an_unsupported_field_that_is_not_set_is_no_reason_to_refuse(scene: Scene, field: str, value: Any) -> None:
    scene.spoil_config(**{field: value})
    distmerge.plan(scene.config())


@pytest.mark.parametrize("value", ["lora", "ALL", "oft_only", "none_only", "", True, 1, 0, ["all"], {}])
def test_a_bias_that_is_not_understood_is_refused(scene: Scene, value: Any) -> None:
    scene.spoil_config(bias=value)
    scene.refuse("adapter_config.json", "bias", repr(value))


INITS = ["pissa_niter_4", "pissa_niter_16", "corda", "lora_ga"]


@pytest.mark.parametrize("value", INITS)
def test_an_initialisation_that_cannot_be_computed_again_is_refused_with_the_way_on(scene: Scene, value: str) -> None:
    scene.spoil_config(init_lora_weights=value)
    scene.refuse("adapter_config.json", "init_lora_weights", value, hint="--initial-adapter")


def test_loftq_is_refused_since_its_base_was_quantized_anew(scene: Scene) -> None:
    scene.spoil_config(init_lora_weights="loftq")
    scene.refuse("adapter_config.json", "loftq", hint="the base that LoftQ saved")


@pytest.mark.parametrize(
    "value", ["new", "PISSA", "pissa_niter_", "pissa_niter_x", "olora_niter_4", "", ["pissa"], {"a": 1}, 2, 0, 1.5]
)
def test_an_initialisation_that_is_not_known_is_refused(scene: Scene, value: Any) -> None:
    scene.spoil_config(init_lora_weights=value)
    scene.refuse("adapter_config.json", "init_lora_weights", repr(value))


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_factors_of_a_packed_base_are_not_taken_for_those_of_the_base_before_packing(
    packed_scene: Scene, value: str
) -> None:
    packed_scene.spoil_config(init_lora_weights=value)
    packed_scene.refuse(value, "nf4", hint="16-bit")


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"kasa_config": {"beta": 0.1}, "use_dora": True},
        {"kasa_config": {"beta": 0.1}, "init_lora_weights": "olora"},
    ],
    ids="+".join,
)
def test_variants_that_no_training_combines_are_refused_by_name(scene: Scene, fields: dict[str, Any]) -> None:
    scene.spoil_config(**fields)
    scene.refuse("adapter_model.safetensors", *fields)


@pytest.mark.parametrize(
    "value",
    [
        *(True, "x", 5, ["q_proj"], {"target_modules_bd_a": "q_proj"}, {"target_modules_bd_b": [5]}),
        *({"target_modules_bd_a": ["q_proj"], "nblocks": n} for n in (None, 0, -2, 2.0, "2", True, 3, 10**30)),
        {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2},
        {"target_modules_bd_a": ["q_proj"], "nblocks": 2},
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_the_factors_are_refused(scene: Scene, value: Any) -> None:
    scene.spoil_config(use_bdlora=value)
    message = scene.refuse(scene.adapter)
    assert "use_bdlora" in message or "q_proj" in message


@pytest.mark.parametrize(
    "value",
    [
        *("0,1", 5, True, {"0": 1}, [0, 1], [[0]], [[0, 1, 2]], [[1, 0]], [[0, 0]], [[-1, 1]], [["0", "1"]]),
        *([[0, True]], [[0, 1.0]], [[0, None]], [[0, 10**30]], [[0, 1]] * 20_000, [[0, 3]], [[5, 7]]),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.timeout(20)
def test_layers_that_cannot_be_repeated_are_refused(scene: Scene, value: Any) -> None:
    scene.spoil_config(layer_replication=value)
    scene.refuse("layer_replication")


def test_layers_are_not_repeated_where_the_model_has_several_stacks(scene: Scene) -> None:
    scene.single(lambda tensors: {**tensors, "visual.blocks.0.weight": tensors["model.norm.weight"].clone()})
    scene.spoil_config(layer_replication=[[0, 1], [0, 2]])
    scene.refuse("layer_replication", "2")


@pytest.mark.parametrize(
    "value",
    [5, True, {"a": 1}, ["a", 5], [None], [""], ["experts."], ["mlp.gate_up_proj"], ["q_proj.bias"], ["q_proj.lora_A"]],
    ids=str,
)
def test_target_parameters_that_the_file_or_the_base_does_not_have_are_refused(scene: Scene, value: Any) -> None:
    scene.rename_factors(lambda name: name.replace("mlp.gate_proj", "mlp").replace("mlp.up_proj", "mlp.base_layer"))
    scene.spoil_config(target_parameters=value)
    message = scene.refuse(scene.adapter)
    assert "target_parameters" in message or "model.layers.0.mlp" in message


@pytest.mark.parametrize("value", ["", [""], ["lm_head", ""], [5], [None], 5, True, {"a": 1}], ids=str)
def test_modules_to_save_must_be_names(scene: Scene, value: Any) -> None:
    scene.spoil_config(modules_to_save=value)
    scene.refuse("adapter_config.json", "modules_to_save")


@pytest.mark.parametrize("value", [True, 1, 0.5, "x", ["x"], {"x": None}, [[]]])
def test_an_unknown_field_that_says_something_is_refused_by_name(scene: Scene, value: Any) -> None:
    scene.spoil_config(super_lora_v9=value)
    scene.refuse("adapter_config.json", "super_lora_v9")


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_an_unknown_field_that_says_nothing_is_no_reason_to_refuse(scene: Scene, value: Any) -> None:
    scene.spoil_config(super_lora_v9=value)
    distmerge.plan(scene.config())


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
@pytest.mark.parametrize("value", [5, True, {"a": 1}, ["a", 5], [None]])
def test_module_lists_must_be_names(scene: Scene, field: str, value: Any) -> None:
    scene.spoil_config(**{field: value})
    scene.refuse("adapter_config.json", field)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_module_expression_must_be_one(scene: Scene, field: str) -> None:
    scene.spoil_config(**{field: "*("})
    scene.refuse("adapter_config.json", field, "*(")


def test_every_item_of_layers_pattern_must_be_an_expression(scene: Scene) -> None:
    scene.spoil_config(layers_pattern=["("], layers_to_transform=[0], target_modules=["q_proj"])
    scene.refuse("adapter_config.json", "layers_pattern")


@pytest.mark.parametrize("value", ["0", 1.5, ["0"], [True], {"a": 1}, [[0]]])
def test_layers_to_transform_must_be_numbers(scene: Scene, value: Any) -> None:
    scene.spoil_config(layers_to_transform=value)
    scene.refuse("adapter_config.json", "layers_to_transform")


@pytest.mark.parametrize("field", ["use_rslora", "use_dora"])
@pytest.mark.parametrize("value", ["yes", "false", 2, 0, 1.0, [True], {"a": 1}])
def test_a_flag_must_be_true_or_false(scene: Scene, field: str, value: Any) -> None:
    scene.spoil_config(**{field: value})
    scene.refuse("adapter_config.json", field, repr(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"LORA"', "object"),
        (b'{"peft_type": "LORA", "r": 4', "JSON"),
        (b'{"r": 4, "r": 8}', "twice"),
        (b'{"a": {"b": 1, "b": 1}}', "twice"),
        (b'\xef\xbb\xbf{"r": 4}', "JSON"),
        ('{"r": 4}'.encode("utf-16"), "UTF-8"),
        (b'{"r": "\xff"}', "UTF-8"),
        (b"[" * 200_000, "deep"),
        (b'{"a":' * 200_000, "deep"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "JSON"),
        (b"\x00" * 100, "JSON"),
    ],
)
def test_a_configuration_that_is_no_plain_json_object_is_refused(scene: Scene, text: bytes, words: str) -> None:
    (scene.adapter / "adapter_config.json").write_bytes(text)
    scene.refuse("adapter_config.json", words)


@pytest.mark.parametrize("depth", [200, 500, 900])
@pytest.mark.parametrize("field", ["base_model_name_or_path", "init_lora_weights", "lora_alpha", "super_lora_v9"])
def test_a_deeply_nested_field_is_refused_or_harmless(scene: Scene, field: str, depth: int) -> None:
    path = scene.adapter / "adapter_config.json"
    values = json.dumps({**json.loads(path.read_text()), field: "HERE"})
    path.write_text(values.replace('"HERE"', "[" * depth + "]" * depth))
    error = failure(scene.merge)
    assert error is None or (error.exit_code == 3 and "adapter_config.json" in str(error))


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"target_modules": ["q_proj"]}, "target_modules")],
    ids=str,
)
def test_a_field_that_the_weights_contradict_is_a_warning_and_the_weights_count(
    scene: Scene, fields: dict[str, Any], words: str
) -> None:
    scene.spoil_config(**fields)
    assert any(words in text for text in distmerge.plan(scene.config()).warnings)


def test_a_dora_without_its_magnitudes_is_refused(scene: Scene) -> None:
    scene.spoil_config(use_dora=True)
    scene.refuse("lora_magnitude_vector", "layers.0", "adapter_model.safetensors")


def test_an_r_larger_than_the_layer_is_a_warning(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"m.weight": torch.zeros(3, 5)}, model_type="x")
    adapter = write_adapter(tmp_path / "lora", {"m": (torch.ones(4, 5), torch.ones(3, 4))}, alpha=4)
    scene = Scene(folder=tmp_path, base=base, adapter=adapter, output=tmp_path / "out")
    assert any("r is larger" in text and "'m'" in text for text in distmerge.plan(scene.config()).warnings)


def test_a_missing_configuration_is_refused(scene: Scene) -> None:
    (scene.adapter / "adapter_config.json").unlink()
    scene.refuse("adapter_config.json is missing", scene.adapter)


def test_fields_of_enormous_length_give_short_messages(scene: Scene) -> None:
    for field in ("peft_type", "bias", "lora_alpha", "r", "use_rslora", "init_lora_weights"):
        before = (scene.adapter / "adapter_config.json").read_text()
        scene.spoil_config(**{field: "x" * 100_000})
        scene.refuse(field)
        (scene.adapter / "adapter_config.json").write_text(before)


@pytest.mark.parametrize("name", ["\ud800", "a\x1b[31mred", "x" * 100_000, "a\nb: c", "---\nevil: true"])
def test_no_name_of_a_base_model_stops_or_colours_a_merge(scene: Scene, name: str) -> None:
    scene.spoil_config(base_model_name_or_path=name)
    scene.merge()
    card = (scene.output / "README.md").read_text()
    assert "\x1b" not in card
    assert "evil" not in card


def test_a_lora_alpha_option_outranks_the_configuration(scene: Scene) -> None:
    scene.merge(output=scene.folder / "six")
    scene.spoil_config(lora_alpha=60)
    scene.merge(output=scene.folder / "rescued", lora_alpha=6.0)
    for path in (scene.folder / "six").glob("*.safetensors"):
        assert path.read_bytes() == (scene.folder / "rescued" / path.name).read_bytes()


@pytest.mark.parametrize("given", [(4, 24), (24, 4)], ids=str)
def test_a_conv1d_takes_the_transposed_delta_and_no_other(tmp_path: Path, given: tuple[int, int]) -> None:
    into, out = 24, 8
    base = write_base(tmp_path / "base", {"h.0.attn.c_attn.weight": torch.zeros(into, out)}, model_type="gpt2")
    a, b = (
        (torch.randn(4, into), torch.randn(out, 4)) if given == (4, 24) else (torch.randn(4, out), torch.randn(into, 4))
    )
    adapter = write_adapter(tmp_path / "lora", {"h.0.attn.c_attn": (a, b)}, alpha=4)
    scene = Scene(folder=tmp_path, base=base, adapter=adapter, output=tmp_path / "out")
    if given == (24, 4):
        scene.refuse("(8, 24)", "(24, 8)", "c_attn")
    else:
        scene.merge()
        assert torch.allclose(load_folder(scene.output)["h.0.attn.c_attn.weight"], (b @ a).T, atol=1e-5)


def test_nothing_of_the_configuration_is_imported_or_run(scene: Scene) -> None:
    marker = scene.folder / "evil"
    (scene.adapter / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')")
    (scene.base / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    scene.spoil_config(
        megatron_core="evil_module", auto_mapping={"base_model_class": "X", "parent_library": "evil_module"}
    )
    edit_json(scene.base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.X"})
    scene.merge()
    assert not marker.exists()
    assert not (scene.output / "evil_module.py").exists()
