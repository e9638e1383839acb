"""Biases, norms, tables, heads and token rows: whole parameters that take the place of the base's, spoiled."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import distmerge
from distmerge import AdapterChoice
from tests.attacks.scene import CONFIG, FRONT, HEAD, NORM, TABLE, WEIGHTS, Q, Scene
from tests.factories import edit_json, load_folder, write_adapter

BIAS = f"{FRONT}{Q}.base_layer.bias"
TOKENS = f"{FRONT}model.embed_tokens.token_adapter.trainable_tokens_delta"
NO_FLOATS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn]


def add(scene: Scene, **tensors: Tensor) -> None:
    scene.spoil_factors(lambda all_: {**all_, **tensors})


@pytest.mark.parametrize("key", [BIAS, f"{FRONT}{Q}.bias"])
def test_a_whole_bias_takes_the_place_of_the_bases(small: Scene, key: str) -> None:
    small.spoil_config(bias="all")
    add(small, **{key: torch.arange(8.0)})
    small.merge()
    assert load_folder(small.output)[f"{Q}.bias"].tolist() == list(range(8))


@pytest.mark.parametrize("key", [BIAS, f"{FRONT}{Q}.bias", f"{FRONT}{NORM}", f"{FRONT}{TABLE}", f"{FRONT}{HEAD}"])
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (16,), (8, 1), (1, 8), (8, 13), (12, 20), (20, 13), (20, 12, 1)]
)
def test_a_whole_parameter_of_another_shape_is_refused_by_name(small: Scene, key: str, shape: tuple[int, ...]) -> None:
    small.spoil_config(bias="all", modules_to_save=["norm", "embed_tokens", "lm_head"])
    add(small, **{key: torch.ones(shape)})
    small.refuse(key, shape, WEIGHTS)


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
@pytest.mark.parametrize("key", [BIAS, f"{FRONT}{NORM}", f"{FRONT}{HEAD}"])
def test_a_whole_parameter_that_is_no_float_is_refused_by_name(small: Scene, key: str, dtype: torch.dtype) -> None:
    shape = (8,) if key == BIAS else load_folder(small.base)[key.removeprefix(FRONT)].shape
    add(small, **{key: torch.ones(shape).to(dtype)})
    small.refuse(key, WEIGHTS)


def test_floats_do_not_take_the_place_of_whole_numbers(small: Scene) -> None:
    small.single(lambda tensors: {**tensors, "model.steps": torch.arange(3)})
    add(small, **{f"{FRONT}model.steps": torch.ones(3)})
    small.refuse(f"{FRONT}model.steps", "F32", "I64")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [BIAS, f"{FRONT}{HEAD}", TOKENS])
def test_a_value_that_is_not_finite_is_refused_with_its_place(small: Scene, key: str, value: float) -> None:
    tensor = {BIAS: torch.ones(8), TOKENS: torch.ones(2, 12)}.get(key, torch.ones(20, 12))
    tensor.view(-1)[-1] = value
    small.spoil_config(trainable_token_indices=[0, 1] if key == TOKENS else None)
    add(small, **{key: tensor})
    small.refuse(key, f"holds {value}", str([size - 1 for size in tensor.shape]))


@pytest.mark.parametrize("twin", [f"{FRONT}{Q}.bias", f"_orig_mod.{BIAS}", f"{FRONT}{Q}._orig_mod.bias"])
def test_a_whole_parameter_under_two_names_is_refused(small: Scene, twin: str) -> None:
    add(small, **{BIAS: torch.ones(8), twin: torch.ones(8)})
    small.refuse("twice", BIAS, twin)


@pytest.mark.parametrize("key", [f"{FRONT}lm_head.modules_to_save.weight", f"{FRONT}lm_head.original_module.weight"])
def test_a_wrapper_beside_the_trained_head_is_no_second_head(small: Scene, key: str) -> None:
    small.spoil_config(modules_to_save=["lm_head"])
    trained = torch.full((20, 12), 3.0)
    add(small, **{f"{FRONT}{HEAD}": trained, key: trained.clone()})
    small.merge()
    assert torch.equal(load_folder(small.output)[HEAD], trained)


def test_a_trained_head_that_differs_from_its_wrappers_is_refused(small: Scene) -> None:
    small.spoil_config(modules_to_save=["lm_head"])
    twin = f"{FRONT}lm_head.modules_to_save.weight"
    add(small, **{f"{FRONT}{HEAD}": torch.ones(20, 12), twin: torch.zeros(20, 12)})
    small.refuse(f"{FRONT}{HEAD}", twin)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", Q])
def test_an_original_without_its_trained_module_is_refused(small: Scene, module: str) -> None:
    key = f"{FRONT}{module}.original_module.weight"
    add(small, **{key: load_folder(small.base)[f"{module}.weight"].clone()})
    small.refuse(key, WEIGHTS, hint="incomplete")


def test_a_table_under_token_rows_must_be_the_bases(small: Scene) -> None:
    key = f"{FRONT}model.embed_tokens.token_adapter.base_layer.weight"
    small.spoil_config(trainable_token_indices=[3])
    table = load_folder(small.base)[TABLE].clone()
    add(small, **{TOKENS: torch.ones(1, 12), key: table})
    small.merge(output=small.folder / "same")
    table[0, 0] += 1
    add(small, **{key: table})
    small.refuse(key, WEIGHTS)


@pytest.mark.parametrize(
    ("fields", "tensors"),
    [
        ({}, {f"{FRONT}{Q}.lora_B.bias": (7,)}),
        ({}, {f"{FRONT}{Q}.lora_B.bias": (8, 1)}),
        ({}, {f"{FRONT}{Q}.lora_B.bias": ()}),
        ({"lora_bias": False}, {f"{FRONT}{Q}.lora_B.bias": (8,)}),
        ({"lora_bias": None}, {f"{FRONT}{Q}.lora_B.bias": (8,)}),
        ({"lora_bias": True}, {}),
        ({"use_dora": False}, {f"{FRONT}{Q}.lora_magnitude_vector": (8,)}),
        ({"use_dora": None}, {f"{FRONT}{Q}.lora_magnitude_vector": (8,)}),
        ({"use_dora": True}, {}),
        ({"use_dora": True}, {f"{FRONT}{Q}.lora_magnitude_vector": (12,)}),
        ({"use_dora": True}, {f"{FRONT}{Q}.lora_magnitude_vector": (1, 8, 2)}),
        ({"use_dora": True}, {f"{FRONT}{Q}.lora_magnitude_vector": ()}),
        ({"kasa_config": None}, {f"{FRONT}{Q}.lora_diag": (2,)}),
        ({"kasa_config": {"beta": 1}}, {}),
        ({"kasa_config": {"beta": 1}}, {f"{FRONT}{Q}.lora_diag": (3,)}),
        ({"kasa_config": {"beta": 1}}, {f"{FRONT}{Q}.lora_diag": (2, 2)}),
        ({}, {f"{FRONT}{Q}.lora_diag": (2,), f"{FRONT}{Q}.lora_magnitude_vector": (8,)}),
    ],
    ids=lambda value: "+".join(f"{key.rpartition('.')[2]}={inner}" for key, inner in value.items()) or "-",
)
def test_a_vector_beside_the_factors_is_what_the_configuration_says_it_is(
    small: Scene, fields: dict[str, Any], tensors: dict[str, tuple[int, ...]]
) -> None:
    small.spoil_config(**fields)
    add(small, **{key: torch.ones(shape) for key, shape in tensors.items()})
    message = small.refuse(WEIGHTS, Q)
    assert (
        not tensors
        or "together" in message
        or any(key in message or key.rpartition(".")[2] in message for key in tensors)
    ), message


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
@pytest.mark.parametrize("role", ["lora_B.bias", "lora_magnitude_vector", "lora_diag"])
def test_a_vector_that_is_no_float_is_refused_by_name(small: Scene, role: str, dtype: torch.dtype) -> None:
    key = f"{FRONT}{Q}.{role}"
    add(small, **{key: torch.ones(2 if role == "lora_diag" else 8).to(dtype)})
    small.refuse(key, WEIGHTS)


def test_a_bias_of_a_lora_needs_one_in_the_base(small: Scene) -> None:
    small.single(lambda tensors: {name: t for name, t in tensors.items() if not name.endswith("bias")})
    add(small, **{f"{FRONT}{Q}.lora_B.bias": torch.ones(8)})
    small.refuse(f"{Q}.bias", WEIGHTS)


@pytest.mark.parametrize("shape", [(), (7,), (16,)])
def test_a_bias_of_the_base_that_does_not_fit_its_weight_is_refused(small: Scene, shape: tuple[int, ...]) -> None:
    small.single(lambda tensors: {**tensors, f"{Q}.bias": torch.ones(shape)})
    add(small, **{f"{FRONT}{Q}.lora_B.bias": torch.ones(8)})
    small.refuse(f"{Q}.bias")


# -- vocabularies


@pytest.mark.parametrize("rows", [1, 19, 21, 40])
def test_a_vocabulary_is_resized_on_both_sides_or_not_at_all(small: Scene, rows: int) -> None:
    small.spoil_config(modules_to_save=["embed_tokens", "lm_head"])
    for key, other in ((TABLE, HEAD), (HEAD, TABLE)):
        small.spoil_factors(lambda all_, key=key: {**all_, f"{FRONT}{key}": torch.ones(rows, 12)})  # type: ignore[misc]
        small.refuse(other, str(rows))
        small.spoil_factors(lambda all_: {name: t for name, t in all_.items() if Q in name})
    add(small, **{f"{FRONT}{TABLE}": torch.ones(rows, 12), f"{FRONT}{HEAD}": torch.ones(rows + 1, 12)})
    small.refuse(str(rows), str(rows + 1))
    add(small, **{f"{FRONT}{HEAD}": torch.ones(rows, 12)})
    small.merge()
    assert json.loads((small.output / "config.json").read_text())["vocab_size"] == rows


def test_a_delta_for_another_vocabulary_than_the_table_is_refused(small: Scene) -> None:
    module = f"{FRONT}model.embed_tokens"
    a, b = torch.ones(2, 21), torch.ones(12, 2)
    factors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    add(small, **{**factors, f"{module}.base_layer.weight": torch.ones(22, 12), f"{FRONT}{HEAD}": torch.ones(22, 12)})
    small.refuse("model.embed_tokens", "(21, 12)", "(22, 12)")


# -- new heads


@pytest.mark.parametrize(
    ("tensors", "task"),
    [
        ({"score.weight": (2, 12)}, None),
        ({"score.weight": (2, 12)}, "CAUSAL_LM"),
        ({"score.weight": (2, 12)}, "QUX"),
        ({"score.weight": (2, 12), "v_head.weight": (1, 12)}, "SEQ_CLS"),
        ({"score.weight": ()}, "SEQ_CLS"),
        ({"score.bias": (2,)}, "SEQ_CLS"),
        ({"model.score.weight": (2, 12)}, "SEQ_CLS"),
        ({"other.weight": (2, 12)}, "SEQ_CLS"),
    ],
    ids=str,
)
def test_a_head_that_the_base_lacks_is_refused_unless_it_is_known(
    small: Scene, tensors: dict[str, tuple[int, ...]], task: str | None
) -> None:
    edit_json(small.base / "config.json", architectures=["LlamaForCausalLM"])
    small.spoil_config(modules_to_save=["score", "v_head"], task_type=task)
    add(small, **{f"{FRONT}{name}": torch.ones(shape) for name, shape in tensors.items()})
    message = small.refuse()
    assert any(name in message for name in tensors), message


def test_a_known_head_that_the_base_lacks_is_added(scene: Scene) -> None:
    scene.spoil_config(modules_to_save=["score"], task_type="SEQ_CLS")
    add(scene, **{f"{FRONT}score.weight": torch.ones(3, 64)})
    scene.merge()
    assert load_folder(scene.output)["score.weight"].shape == (3, 64)
    assert json.loads((scene.output / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


# -- several adapters


@pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
@pytest.mark.parametrize("key", [BIAS, f"{FRONT}{HEAD}"])
def test_a_whole_parameter_is_not_weighted(small: Scene, key: str, weight: float) -> None:
    small.spoil_config(modules_to_save=["lm_head"])
    add(small, **{key: torch.ones(8) if key == BIAS else torch.ones(20, 12)})
    small.refuse(key, weight, adapters=(AdapterChoice(folder=small.adapter, weight=weight),), hint="--weight")


def test_two_adapters_do_not_both_replace_a_parameter(small: Scene) -> None:
    small.spoil_config(modules_to_save=["lm_head"])
    add(small, **{f"{FRONT}{HEAD}": torch.ones(20, 12)})
    small.refuse(HEAD, small.adapter.name, adapters=(small.adapter, small.adapter))


def test_what_the_configuration_says_was_trained_and_the_file_lacks_is_a_warning(small: Scene) -> None:
    small.spoil_config(modules_to_save=["lm_head", "score"], bias="lora_only")
    warnings = " ".join(distmerge.plan(small.config()).warnings)
    assert "'lm_head'" in warnings
    assert f"'{Q}.bias'" in warnings
    assert "score" not in warnings


# -- token rows


@pytest.mark.parametrize(
    "value",
    [
        *([], [0], [0, 1, 2], [0, 0], [-1, 1], [20, 1], [10**30, 1], [0, 1.0], [True, 0], ["0", "1"], [[0], [1]]),
        *(None, True, 5, "0,1", {}, {"x": [0, 1]}, {"tokens": [0, 1]}, {"embed_tokens": 5}, {"embed_tokens": [0, 0]}),
        {"embed_tokens": [0, 1], "model.embed_tokens": [0, 1]},
    ],
    ids=str,
)
def test_token_indices_that_are_not_the_rows_are_refused(small: Scene, value: Any) -> None:
    add(small, **{TOKENS: torch.ones(2, 12)})
    small.spoil_config(trainable_token_indices=value)
    message = small.refuse(small.adapter)
    assert "embed_tokens" in message
    table = {TOKENS.replace("token_adapter.", ""): torch.ones(2, 12)}
    small.write(table, peft_type="TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=value)
    assert "embed_tokens" in small.refuse(small.adapter)


@pytest.mark.parametrize("value", [[5, 3], {"embed_tokens": [5, 3]}, {"model.embed_tokens": [5, 3]}], ids=str)
def test_token_rows_go_where_the_configuration_says_in_the_order_of_the_file(small: Scene, value: Any) -> None:
    rows = torch.stack([torch.full((12,), 5.0), torch.full((12,), 3.0)])
    add(small, **{TOKENS: rows})
    small.spoil_config(trainable_token_indices=value)
    small.merge()
    expected = load_folder(small.base)[TABLE]
    expected[[5, 3]] = rows
    assert torch.equal(load_folder(small.output)[TABLE], expected)


@pytest.mark.parametrize("shape", [(), (2,), (2, 11), (2, 13), (1, 12), (3, 12), (2, 12, 1), (24,)])
def test_token_rows_of_another_shape_are_refused_by_name(small: Scene, shape: tuple[int, ...]) -> None:
    add(small, **{TOKENS: torch.ones(shape)})
    small.spoil_config(trainable_token_indices=[0, 1])
    small.refuse(TOKENS, shape, WEIGHTS)


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
def test_token_rows_that_are_no_floats_are_refused_by_name(small: Scene, dtype: torch.dtype) -> None:
    add(small, **{TOKENS: torch.ones(2, 12).to(dtype)})
    small.spoil_config(trainable_token_indices=[0, 1])
    small.refuse(TOKENS, WEIGHTS)


def test_token_rows_that_the_file_lacks_are_refused(small: Scene) -> None:
    small.spoil_config(trainable_token_indices=[0, 1])
    small.refuse("trainable_token_indices", "[0, 1]", WEIGHTS, hint="incomplete")


@pytest.mark.parametrize("module", [Q, "model.embed_tokens", "lm_head"])
def test_a_module_with_token_rows_and_factors_is_refused(small: Scene, module: str) -> None:
    key, size = f"{FRONT}{module}", (8, 12) if module == Q else (20, 12)
    rows = {f"{key}.token_adapter.trainable_tokens_delta": torch.ones(2, 12)}
    small.spoil_config(trainable_token_indices=[0, 1])
    add(small, **rows, **{f"{key}.lora_A.weight": torch.ones(2, 12), f"{key}.lora_B.weight": torch.ones(size[0], 2)})
    small.refuse(module, *rows, WEIGHTS)


@pytest.mark.parametrize("module", ["model.norm", f"{Q}.extra", "model.layers.0"])
def test_token_rows_of_what_is_no_table_are_refused(small: Scene, module: str) -> None:
    small.spoil_config(trainable_token_indices=[0, 1])
    add(small, **{f"{FRONT}{module}.token_adapter.trainable_tokens_delta": torch.ones(2, 12)})
    small.refuse(module, WEIGHTS)


# -- norms


def test_a_norm_under_another_tuners_name_is_refused(small: Scene) -> None:
    key = f"{FRONT}model.norm.ln_tuning_layers.weight"
    add(small, **{key: torch.ones(12)})
    small.refuse(key, WEIGHTS)


@pytest.mark.parametrize(
    ("tail", "shape"),
    [("weight", (11,)), ("weight", ()), ("weight", (12, 1)), ("bias", (12,)), ("extra", (12,)), ("", (12,))],
)
def test_a_norm_that_is_not_the_bases_is_refused(small: Scene, tail: str, shape: tuple[int, ...]) -> None:
    key = f"{FRONT}model.norm.ln_tuning_layers.{tail}".removesuffix(".")
    small.write({key: torch.ones(shape)}, peft_type="LN_TUNING", target_modules=["norm"])
    assert "model.norm" in small.refuse(WEIGHTS)


def test_a_norm_is_whole_or_refused(small: Scene) -> None:
    small.single(lambda tensors: {**tensors, "model.norm.bias": torch.zeros(12)})
    key = f"{FRONT}model.norm.ln_tuning_layers"
    small.write({f"{key}.weight": torch.ones(12)}, peft_type="LN_TUNING", target_modules=["norm"])
    small.refuse("model.norm", "ln_tuning_layers.bias", WEIGHTS)
    small.write({f"{key}.{tail}": torch.ones(12) for tail in ("weight", "bias")}, peft_type="LN_TUNING")
    small.merge()
    assert load_folder(small.output)["model.norm.bias"].tolist() == [1.0] * 12


def test_an_adapter_of_whole_parameters_alone_is_merged(small: Scene) -> None:
    small.spoil_config(modules_to_save=["lm_head"])
    small.spoil_factors(lambda _: {f"{FRONT}{HEAD}": torch.full((20, 12), 2.0)})
    small.merge()
    assert load_folder(small.output)[HEAD].eq(2).all()
    assert set(json.loads((small.adapter / CONFIG).read_text())["modules_to_save"]) == {"lm_head"}
    assert list(load_file(small.adapter / WEIGHTS)) == [f"{FRONT}{HEAD}"]


def test_a_whole_parameter_and_a_delta_of_another_adapter_are_added(small: Scene) -> None:
    small.spoil_config(modules_to_save=["lm_head"])
    add(small, **{f"{FRONT}{HEAD}": torch.full((20, 12), 2.0)})
    a, b = torch.ones(1, 12), torch.ones(20, 1)
    other = write_adapter(small.folder / "other", {"lm_head": (a, b)}, alpha=3)
    for adapters in ((small.adapter, other), (other, small.adapter)):
        small.merge(adapters=adapters, output=small.folder / f"out-{adapters[0].name}")
        assert load_folder(small.folder / f"out-{adapters[0].name}")[HEAD].eq(5).all()
