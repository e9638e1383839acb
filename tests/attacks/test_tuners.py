"""Adapters of every tuner but LoRA: missing, misshapen and surplus tensors, hostile options, stray indices."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distmerge.adapter.tuners.fields import FIELDS
from distmerge.adapter.tuners.registry import TUNERS
from tests.attacks.scene import CONFIG, FRONT, WEIGHTS, Q, Scene, failure
from tests.factories import load_folder

# A fitting adapter of each tuner for a weight (8, 12) with a bias: the configuration, and the shape of each tensor, or
# the values of one that holds indices. Names without a module are shared.
Shape = tuple[int, ...]
_LOHA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 12)}
_LOKR = {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
_VERA = {"vera_lambda_b": (8,), "vera_lambda_d": (3,), "base_model.vera_A": (3, 12), "base_model.vera_B": (8, 3)}
_PVERA = {"pvera_lambda_b": (8,), "pvera_lambda_d": (6,), "base_model.pvera_A": (6, 12), "base_model.pvera_B": (8, 3)}
_RANDLORA = {"randlora_lambda": (2, 3), "randlora_gamma": (3, 8)}
_RANDLORA_ALL = {**_RANDLORA, "base_model.randlora_A": (2, 1, 8), "base_model.randlora_B": (12, 3, 2)}
_OSF = {"osf_svd_params.U_low": (8, 3), "osf_svd_params.S_low": (3,), "osf_svd_params.V_low": (3, 12)}
_PEANUT = {"peanut_A.weight": (2, 8), "peanut_B.weight": (8, 2)}
_PEANUT_DEEP = {"peanut_encoders.0.weight": (2, 2), "peanut_decoders.0.weight": (2, 2)}
_SHIRA = {"shira_weight": (3,), "shira_indices": [[0, 3, 7], [11, 0, 5]]}
_SUPER = {"supertuning_values": (3,), "supertuning_indices": [0, 95, 40]}
_UNI_INDICES = {"unilora_indices_A": [[0, 4] * 6, [1, 2] * 6], "unilora_indices_B": [[0, 4]] * 8}
_UNI_SCALES = {"unilora_scales_A": (2, 12), "unilora_scales_B": (8, 2), "base_model.unilora_theta_d": (5,)}
_UNILORA = {**_UNI_INDICES, **_UNI_SCALES}
_VBLORA = {"vblora_logits_A": (2, 3, 5), "vblora_logits_B": (2, 2, 5), "base_model.vblora_vector_bank": (5, 4)}
_VBLORA_TOP = {
    "vblora_logits_A_topk_indices": [[[0, 4]] * 3, [[1, 3]] * 3],
    "vblora_logits_A_topk_weights": (2, 3, 1),
    "vblora_logits_B_topk_indices": [[[0, 4]] * 2] * 2,
    "vblora_logits_B_topk_weights": (2, 2, 1),
    "base_model.vblora_vector_bank": (5, 4),
}
_OFT = {"coft": False, "eps": 1e-4, "block_share": False, "num_cayley_neumann_terms": 5}
SAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ADALORA": ({"lora_alpha": 4, "init_r": 3}, {"lora_A": (2, 12), "lora_B": (8, 2), "lora_E": (2, 1)}),
    "BEFT": ({}, {"beft_bias": (1, 8)}),
    "BOFT": ({}, {"boft_R": (1, 3, 4, 4), "boft_s": (8, 1)}),
    "BONE": ({}, {"bone_block": (2, 8)}),
    "BONE bat": ({"init_weights": "bat"}, {"bone_block": (2, 4, 4)}),
    "C3A": ({}, {"c3a_kernel": (2, 3, 4)}),
    "DEFT": ({"decomposition_method": "relu", "para": False, "alpha": 3}, {"deft_P": (8, 2), "deft_R": (2, 12)}),
    "DELORA": ({}, {"delora_A": (2, 12), "delora_B": (8, 2), "delora_lambda": (1,), "delora_w_norm": (12,)}),
    "FOURIERFT": ({"scaling": 2.0, "random_loc_seed": 7}, {"fourierft_spectrum": (9,)}),
    "GLORA": ({}, {"glora_A.Xd": (8, 2), "glora_A.Xu": (2, 12), "glora_B.X": (8, 1)}),
    "GRALORA": ({"alpha": 3, "hybrid_r": 0}, {"gralora_A": (2, 6, 4), "gralora_B": (2, 4, 4)}),
    "HIRA": ({}, {"hira_A": (2, 12), "hira_B": (8, 2)}),
    "HRA": ({"apply_GS": True}, {"hra_u": (12, 2)}),
    "IA3": ({}, {"ia3_l": (8, 1)}),
    "LN_TUNING": ({}, {"ln_tuning_layers.weight": (8, 12), "ln_tuning_layers.bias": (8,)}),
    "LOHA": ({"alpha": 3}, _LOHA),
    "LOKR": ({"alpha": 3, "r": 2}, _LOKR),
    "MISS": ({}, {"miss_block": (2, 8)}),
    "MISS mini": ({"init_weights": "mini", "mini_r": 4}, {"miss_block": (2, 4)}),
    "OFT": ({**_OFT, "use_cayley_neumann": False}, {"oft_R.weight": (3, 6)}),
    "OFT series": ({**_OFT, "use_cayley_neumann": True}, {"oft_R.weight": (3, 6)}),
    "OSF": ({}, _OSF),
    "PEANUT": ({"depth": 1, "act_fn": "relu", "scaling": 0.5}, {**_PEANUT, **_PEANUT_DEEP}),
    "PVERA": ({"sample_at_inference": False}, _PVERA),
    "RANDLORA": ({"randlora_alpha": 3}, _RANDLORA_ALL),
    "ROAD": ({"variant": "road_1", "group_size": 4}, {"road_theta": (4,), "road_alpha": (4,)}),
    "SHIRA": ({}, _SHIRA),
    "SUPERTUNING": ({"r": None}, _SUPER),
    "TRAINABLE_TOKENS": ({"token_indices": [3, 1]}, {"trainable_tokens_delta": (2, 12)}),
    "UNILORA": ({}, _UNILORA),
    "VBLORA": ({"topk": 2}, _VBLORA),
    "VBLORA top": ({"topk": 2, "save_only_topk_weights": True}, _VBLORA_TOP),
    "VERA": ({}, _VERA),
    "WAVEFT": (
        {"scaling": 2.0, "random_loc_seed": 7, "use_idwt": True, "wavelet_family": "db1"},
        {"waveft_spectrum": (9,)},
    ),
}
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2.5, 10**30, 10**400, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "2", [], [1], ["x"], {}, {"x": 1}, {"(": 1}, {"x" * 2000: 1}),
]
each_sample = pytest.mark.parametrize("sample", SAMPLES)


def tuner_of(sample: str) -> str:
    return sample.split(maxsplit=1)[0]


def key_of(name: str) -> str:
    return name if name.startswith("base_model.") else f"{FRONT}{Q}.{name}"


def make(sample: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a sample."""
    generator = torch.Generator().manual_seed(1)
    options, shapes = SAMPLES[sample]
    tensors = {
        key_of(name): torch.tensor(value, dtype=torch.int32)
        if isinstance(value, list)
        else torch.rand(value, generator=generator) * 0.4 + 0.1
        for name, value in shapes.items()
    }
    return {"peft_type": tuner_of(sample), "target_modules": ["q_proj"], **options}, tensors


def test_there_is_a_sample_of_every_tuner() -> None:
    assert {tuner_of(sample) for sample in SAMPLES} == set(TUNERS)


@each_sample
def test_the_sample_itself_merges_and_is_seen(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    small.write(tensors, **config)
    assert small.merge().num_adapter_tensors == len(tensors)
    merged, base = load_folder(small.output), load_folder(small.base)
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed
    assert changed <= {f"{Q}.weight", f"{Q}.bias"}


@each_sample
def test_a_sample_without_one_of_its_tensors_is_refused_by_name(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    for lost in tensors:
        small.write({key: t for key, t in tensors.items() if key != lost}, **config)
        error = small.try_plan()
        assert error is not None, lost
        tail = lost.removeprefix(f"{FRONT}{Q}.").removeprefix("base_model.")
        assert Q in str(error) or tail in str(error) or len(tensors) == 1, error


def misshapen(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in shapes that it cannot have."""
    flat = tensor.reshape(-1)
    yield flat[0].clone()
    yield flat[:0]
    if tensor.shape != (1,):
        yield flat[:1]
    yield tensor[None]
    yield tensor[..., None]
    if tensor.dim() > 1:
        yield flat
        yield torch.cat([tensor, tensor], dim=-1)
    if tensor.dim() > 1 and tensor.shape[0] != tensor.shape[-1]:
        yield tensor.transpose(0, -1)
    yield torch.cat([tensor, tensor])


# Of these sizes any will do, since nothing else in the file tells them.
FREE = {
    **dict.fromkeys(("bone_block", "miss_block", "hra_u", "fourierft_spectrum", "waveft_spectrum"), True),
    **dict.fromkeys(("base_model.vera_A", "base_model.vera_B", "base_model.pvera_A", "base_model.pvera_B"), True),
    **dict.fromkeys(("base_model.randlora_A", "base_model.randlora_B", "base_model.unilora_theta_d"), True),
    **dict.fromkeys(("base_model.vblora_vector_bank", "c3a_kernel", "boft_R", "glora_B.X", "ia3_l"), True),
}


@each_sample
def test_a_tensor_of_another_shape_is_refused_by_name(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    for key, tensor in tensors.items():
        for wrong in misshapen(tensor):
            small.write({**tensors, key: wrong}, **config)
            error = small.try_plan()
            tail = key.removeprefix(f"{FRONT}{Q}.")
            free = tail in FREE and (wrong.dim() == tensor.dim() or wrong.shape == (1,))
            assert error is not None or free, (key, wrong.shape)
            assert error is None or Q in str(error) or tail in str(error), error


@each_sample
def test_a_tensor_of_another_kind_is_refused_by_name(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    for key, tensor in tensors.items():
        kinds = [torch.bool, torch.int8, torch.float64, torch.complex64, torch.float8_e4m3fn]
        kinds += [torch.int64, torch.uint8, torch.int16] if tensor.is_floating_point() else [torch.float16]
        for kind in kinds:
            small.write({**tensors, key: tensor.to(kind)}, **config)
            error = small.try_plan()
            assert error is not None, (key, kind)
            assert repr(key) in str(error), error


@each_sample
def test_a_value_that_is_not_finite_is_refused_by_name(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            spoiled = tensor.clone()
            spoiled.view(-1)[-1] = math.nan
            small.write({**tensors, key: spoiled}, **config)
            error = small.try_plan()
            assert error is not None, key
            assert repr(key) in str(error), error


@each_sample
def test_a_surplus_tensor_is_refused_by_name(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    own = {key.removeprefix(f"{FRONT}{Q}.") for key in tensors}
    surplus = [
        "extra",
        "lora_A.weight",
        "hada_t1",
        "lokr_t2",
        "lora_magnitude_vector",
        "weight",
        "peanut_encoders.7.weight",
    ]
    names = [key_of(name) for name in surplus if name not in own] + ["base_model.extra"]
    names += [name for name in ("base_model.vera_A", "base_model.randlora_B") if name not in tensors]
    for name in names:
        small.write({**tensors, name: torch.ones(2, 12)}, **config)
        error = small.try_plan()
        assert error is not None, name
        assert Q in str(error) or repr(name) in str(error), error


@each_sample
def test_a_tensor_under_two_names_or_of_two_adapters_is_refused(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    for key, tensor in tensors.items():
        small.write({**tensors, key.replace(".layers", "._orig_mod.layers"): tensor.clone()}, **config)
        assert "twice" in str(small.try_plan()) or FRONT not in key, key
        small.write({**tensors, f"{key}.other": tensor.clone()}, **config)
        assert small.try_plan() is not None, key


@each_sample
def test_no_value_of_an_option_makes_anything_but_a_plan_or_a_refusal(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    options = SAMPLES[sample][0].keys() | {"alpha_pattern", "rank_pattern", "init_weights", "bias", "peft_version"}
    for field in sorted(options & FIELDS[config["peft_type"]]):
        for value in HOSTILE:
            small.write(tensors, **config)
            (small.adapter / CONFIG).write_text(json.dumps({**config, field: value}))
            error = small.try_plan()
            assert error is None or field in str(error) or Q in str(error) or CONFIG in str(error), (
                field,
                value,
                error,
            )


READ = {
    "ADALORA": ["lora_alpha", "init_r"],
    "DEFT": ["decomposition_method", "para"],
    "FOURIERFT": ["scaling", "random_loc_seed"],
    "GRALORA": ["alpha", "hybrid_r"],
    "HRA": ["apply_GS"],
    "LOHA": ["alpha"],
    "LOKR": ["alpha"],
    "MISS mini": ["mini_r", "init_weights"],
    "OFT": ["coft", "block_share", "use_cayley_neumann"],
    "OFT series": ["num_cayley_neumann_terms"],
    "PEANUT": ["depth", "act_fn", "scaling"],
    "PVERA": ["sample_at_inference"],
    "RANDLORA": ["randlora_alpha"],
    "ROAD": ["variant", "group_size"],
    "TRAINABLE_TOKENS": ["token_indices"],
    "VBLORA": ["topk"],
    "WAVEFT": ["scaling", "random_loc_seed", "use_idwt", "wavelet_family"],
}


@pytest.mark.parametrize(("sample", "field"), [(sample, field) for sample, fields in READ.items() for field in fields])
@pytest.mark.parametrize("value", ["NaN", "1e999", '"2"', "[2]", '{"a": 2}', "..."], ids=str)
def test_an_option_that_the_arithmetic_needs_is_there_and_of_its_kind(
    small: Scene, sample: str, field: str, value: str
) -> None:
    config, tensors = make(sample)
    del config[field]
    text = json.dumps(config)
    small.write(tensors, **config)
    (small.adapter / CONFIG).write_text(text if value == "..." else f'{text[:-1]}, "{field}": {value}}}')
    message = small.refuse()
    assert field in message or Q in message, message


@pytest.mark.parametrize(
    "sample", [name for name in SAMPLES if "scaling" in SAMPLES[name][0] or "alpha" in SAMPLES[name][0]]
)
@pytest.mark.parametrize("value", [1e300, -1e39, 10**40])
def test_a_scaling_beyond_float32_is_refused(small: Scene, sample: str, value: float) -> None:
    config, tensors = make(sample)
    small.write(tensors, **{**config, "scaling" if "scaling" in config else "alpha": value})
    small.refuse("scaling", Q, WEIGHTS)


@each_sample
@pytest.mark.parametrize("value", [True, 1, 0.5, "x", ["x"], {"x": None}])
def test_an_unknown_field_that_says_something_is_refused_by_name(small: Scene, sample: str, value: Any) -> None:
    config, tensors = make(sample)
    small.write(tensors, **config, super_tuner_v9=value)
    small.refuse(CONFIG, "super_tuner_v9")


@pytest.mark.parametrize(
    "fields",
    [
        *({"use_dora": True}, {"use_rslora": True}, {"layer_replication": [[0, 1], [0, 1]]}, {"use_qalora": True}),
        *({"target_parameters": ["q_proj.weight"]}, {"kasa_config": {"beta": 1}}, {"trainable_token_indices": [1]}),
    ],
    ids=str,
)
def test_what_adalora_inherits_from_lora_and_does_not_do_is_refused(small: Scene, fields: dict[str, Any]) -> None:
    config, tensors = make("ADALORA")
    small.write(tensors, **config, **fields)
    small.refuse(CONFIG, *fields)


@pytest.mark.parametrize("sample", sorted(name for name in SAMPLES if name not in ("ADALORA", "SUPERTUNING")))
def test_options_that_mean_nothing_for_a_tuner_are_refused(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    small.write(tensors, **config)
    small.refuse("--lora-alpha", tuner_of(sample), lora_alpha=3.0)
    small.refuse("--use-rslora", tuner_of(sample), use_rslora=True)


@pytest.mark.parametrize("shapes", [((0, 12), (8, 0), (0, 1))])
def test_a_module_that_adalora_pruned_whole_stays_as_it_is(small: Scene, shapes: tuple[Shape, ...]) -> None:
    config, tensors = make("ADALORA")
    names = ("lora_A", "lora_B", "lora_E")
    pruned = {key_of(name): torch.ones(shape) for name, shape in zip(names, shapes, strict=True)}
    head = {f"{FRONT}lm_head.{name}": tensors[key_of(name)] for name in names}
    head[f"{FRONT}lm_head.lora_B"] = torch.ones(20, 2)
    small.write({**pruned, **head}, **config)
    small.merge()
    merged, base = load_folder(small.output), load_folder(small.base)
    assert torch.equal(merged[f"{Q}.weight"], base[f"{Q}.weight"])
    assert not torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_E"])
@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 12), (8, 0), (2, 0)], ids=str)
def test_an_empty_tensor_that_pruning_does_not_leave_is_refused(small: Scene, name: str, shape: Shape) -> None:
    config, tensors = make("ADALORA")
    small.write({**tensors, key_of(name): torch.ones(shape)}, **config)
    small.refuse(key_of(name), WEIGHTS, hint="gather")


CHANGES_NOTHING = {
    "ADALORA": "lora_E",
    "BEFT": "beft_bias",
    "BONE": "bone_block",
    "BONE bat": "bone_block",
    "C3A": "c3a_kernel",
    "DELORA": "delora_lambda",
    "FOURIERFT": "fourierft_spectrum",
    "HIRA": "hira_B",
    "LOHA": "hada_w2_b",
    "LOKR": "lokr_w1",
    "MISS": "miss_block",
    "MISS mini": "miss_block",
    "OFT": "oft_R.weight",
    "OFT series": "oft_R.weight",
    "PEANUT": "peanut_B.weight",
    "PVERA": "pvera_lambda_b",
    "RANDLORA": "randlora_lambda",
    "SHIRA": "shira_weight",
    "UNILORA": "unilora_scales_B",
    "VERA": "vera_lambda_b",
    "WAVEFT": "waveft_spectrum",
}


@pytest.mark.parametrize("sample", CHANGES_NOTHING)
def test_an_adapter_that_changes_nothing_is_refused_unless_allowed(small: Scene, sample: str) -> None:
    config, tensors = make(sample)
    tensors[key_of(CHANGES_NOTHING[sample])].zero_()
    small.write(tensors, **config)
    small.refuse("zero", Q, WEIGHTS, hint="--allow-zero-delta")
    small.merge(allow_zero_delta=True)
    merged, base = load_folder(small.output), load_folder(small.base)
    assert all(torch.allclose(merged[name], base[name], atol=1e-6) for name in base)


INDICES = [
    (sample, name) for sample, (_, shapes) in SAMPLES.items() for name, v in shapes.items() if isinstance(v, list)
]


@pytest.mark.parametrize(("sample", "name"), INDICES)
@pytest.mark.parametrize("value", [-1, 96, 1000, 2**31 - 1, -(2**31)])
def test_an_index_outside_of_what_it_indexes_is_refused_by_name(
    small: Scene, sample: str, name: str, value: int
) -> None:
    config, tensors = make(sample)
    tensors[key_of(name)].view(-1)[-1] = value
    small.write(tensors, **config)
    small.refuse(key_of(name), WEIGHTS)


@pytest.mark.parametrize(("row", "col", "fits"), [(7, 11, True), (8, 0, False), (0, 12, False), (11, 7, False)])
def test_a_place_of_shira_is_a_row_and_a_column_of_the_weight(small: Scene, row: int, col: int, fits: bool) -> None:
    config, tensors = make("SHIRA")
    tensors[key_of("shira_indices")][:, 0] = torch.tensor([row, col])
    small.write(tensors, **config)
    assert (small.try_plan() is None) == fits


@pytest.mark.parametrize("value", [0.5, -1.0, 8.0, math.nan, math.inf])
def test_an_index_that_was_saved_as_a_float_must_be_one(small: Scene, value: float) -> None:
    config, tensors = make("SHIRA")
    key = key_of("shira_indices")
    whole = tensors[key].float()
    small.write({**tensors, key: whole}, **config)
    small.merge(output=small.folder / "floats")
    small.write(tensors, **config)
    small.merge(output=small.folder / "integers")
    merged, expected = (load_folder(small.folder / name) for name in ("floats", "integers"))
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    whole[0, 0] = value
    small.write({**tensors, key: whole}, **config)
    small.refuse(key, WEIGHTS)


def test_places_that_are_named_twice_are_both_added(small: Scene) -> None:
    config, tensors = make("SHIRA")
    tensors[key_of("shira_indices")][:] = 3
    small.write(tensors, **config)
    small.merge()
    added = load_folder(small.output)[f"{Q}.weight"] - load_folder(small.base)[f"{Q}.weight"]
    assert added[3, 3].item() == pytest.approx(tensors[key_of("shira_weight")].sum().item(), rel=1e-5)
    assert added.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_indices_of_every_width_that_peft_saves_are_read(small: Scene, dtype: torch.dtype) -> None:
    config, tensors = make("VBLORA top")
    small.write({key: t if t.is_floating_point() else t.to(dtype) for key, t in tensors.items()}, **config)
    small.merge()


def test_a_copy_of_a_shared_tensor_that_differs_is_refused_by_name(small: Scene) -> None:
    config, tensors = make("RANDLORA")
    twin, shared = key_of("randlora_A"), "base_model.randlora_A"
    small.write({**tensors, twin: tensors[shared].clone()}, **config)
    small.merge()
    small.write({**tensors, twin: tensors[shared] + 1}, **config)
    small.refuse(twin, shared, output=small.folder / "again")


@pytest.mark.parametrize("shape", [(), (7,), (16,)])
@pytest.mark.parametrize("sample", ["IA3", "ROAD", "BEFT"])
def test_a_bias_of_the_base_that_does_not_fit_its_weight_is_refused(small: Scene, sample: str, shape: Shape) -> None:
    config, tensors = make(sample)
    small.single(lambda all_: {**all_, f"{Q}.bias": torch.ones(shape)})
    small.write(tensors, **config)
    small.refuse(Q, shape)


@pytest.mark.parametrize("shape", [(), (8,), (8, 12, 1), (2, 8, 6), (12, 8)])
@pytest.mark.parametrize("sample", [name for name in SAMPLES if name not in ("BEFT", "LN_TUNING")])
def test_a_weight_of_the_base_that_is_no_matrix_of_its_size_is_refused(small: Scene, sample: str, shape: Shape) -> None:
    config, tensors = make(sample)
    small.single(lambda all_: {**all_, f"{Q}.weight": torch.ones(shape)})
    small.write(tensors, **config)
    error = small.try_plan()
    if shape == (12, 8) and error is None:
        assert sample in ("FOURIERFT", "WAVEFT", "SHIRA", "SUPERTUNING")  # nothing in their files tells the size
    else:
        assert Q in str(error), error


@pytest.mark.parametrize("sample", ["OFT", "OFT series", "BOFT", "HRA", "DELORA", "OSF", "DEFT"])
@pytest.mark.parametrize("size", [1e-30, 1e10, 1e30])
def test_values_beyond_all_measure_give_finite_weights_or_words(small: Scene, sample: str, size: float) -> None:
    config, tensors = make(sample)
    small.write({key: t * size for key, t in tensors.items()}, **config)
    error = failure(small.merge)
    assert error is None or error.exit_code in (3, 4), error
    assert error is not None or load_folder(small.output)[f"{Q}.weight"].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@each_sample
def test_a_base_that_is_not_finite_is_named_whatever_is_computed_from_it(
    small: Scene, sample: str, value: float
) -> None:
    config, tensors = make(sample)
    small.write(tensors, **config)
    small.single(lambda all_: {name: torch.full_like(t, value) if Q in name else t for name, t in all_.items()})
    error = failure(small.merge)
    if error is None:
        assert sample == "LN_TUNING"  # takes the place of what is not finite
    else:
        assert error.exit_code == 4
        assert Q in str(error)
    assert (error is None) == small.output.exists()
