"""Packed bases whose tensors, companions and configuration do not fit together, or that nobody can dequantize."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmerge.errors import VerifyError
from tests import factories, formats
from tests.attacks.scene import Scene
from tests.formats import FP8, INT8, MXFP4, compressed, noise

MODULE = "model.layers.0.self_attn.q_proj"
W = f"{MODULE}.weight"
SCALE = f"{W}_scale_inv"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
Tensors = dict[str, Tensor]


def scene_of(folder: Path, tensors: Tensors, section: Any, *, target: str = MODULE, **config: Any) -> Scene:
    """A base of `tensors` with a head, and a LoRA on the layer `target`."""
    base = formats.write(folder / "base", {**tensors, "lm_head.weight": noise(20, 96)}, section, **config)
    rows = 20 if target == "lm_head" else 160
    adapter = factories.write_adapter(folder / "lora", {target: (noise(2, 96), noise(rows, 2))})
    return Scene(folder=folder, base=base, adapter=adapter, output=folder / "out")


def fp8(**changes: Tensor | None) -> Tensors:
    """FP8 in blocks of 128 with its tensors changed, or without those that are None; `weight` and `scale` name them."""
    names = {"weight": W, "scale": SCALE}
    tensors: dict[str, Tensor | None] = {**formats.fp8(W, noise(160, 96))}
    tensors |= {names.get(name, f"{MODULE}.{name}"): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_the_scene_itself_merges(tmp_path: Path) -> None:
    scene_of(tmp_path, fp8(), FP8).merge()


def test_a_weight_without_its_scales_is_refused(tmp_path: Path) -> None:
    scene_of(tmp_path, fp8(scale=None), FP8).refuse(W, "F8_E4M3", "no scales", hint="incomplete")


def test_8_bit_floats_that_no_section_and_no_scales_explain_are_no_target(tmp_path: Path) -> None:
    scene_of(tmp_path, fp8(scale=None), None).refuse(W, "F8_E4M3", "without scales", hint="16-bit")


def test_scales_without_their_weight_are_refused(tmp_path: Path) -> None:
    for section in (FP8, None):
        folder = tmp_path / str(section is None)
        scene_of(folder, fp8(weight=None), section, target="lm_head").refuse(SCALE, "no weight")


def test_scales_beside_a_plain_weight_are_refused(tmp_path: Path) -> None:
    scene_of(tmp_path, fp8(weight=noise(160, 96)), FP8).refuse(SCALE)
    tensors = {W: noise(160, 96), f"{W}_scale": torch.ones(160, 1)}
    scene_of(tmp_path / "2", tensors, compressed()).refuse(W, f"{W}_scale", "F32")


def test_two_kinds_of_scales_for_one_weight_are_refused(tmp_path: Path) -> None:
    scene_of(tmp_path, fp8(weight_scale=torch.ones(160, 1)), FP8).refuse(W, SCALE, f"{W}_scale", "two scales")


@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(1, 1, dtype=torch.float64),
        torch.ones(2, 1, dtype=torch.int32),
        torch.ones(2, 1, dtype=torch.int8),
        torch.ones(2, 1).to(torch.float8_e4m3fn),
        torch.ones(1, 2),
        torch.ones(2, 2),
        torch.ones(3, 1),
        torch.ones(2),
        torch.ones(96),
        torch.ones(160, 96),
        torch.ones(80, 48),
        torch.ones(2, 1, 1),
        torch.ones(0, 1),
    ],
    ids=lambda value: f"{tuple(value.shape)}-{value.dtype}",
)
def test_scales_of_another_dtype_or_grid_are_refused_with_both_sides(scale: Tensor, tmp_path: Path) -> None:
    scene_of(tmp_path, fp8(scale=scale), FP8).refuse(SCALE, "expected", tuple(scale.shape))


@pytest.mark.parametrize("structure", [5, [5], "128", "x", "axb", {"a": 1}, [10**400, 1], "9" * 5000 + "x1", True])
def test_a_block_structure_that_is_none_is_refused(structure: Any, tmp_path: Path) -> None:
    section = compressed(strategy="block", block_structure=structure)
    scene_of(tmp_path, formats.fp8(W, noise(160, 96), tail="_scale"), section).refuse("block size", "config.json")


@pytest.mark.parametrize("shape", [(0, 96), (160, 0), (160,), (2, 2, 2, 2)], ids=str)
def test_a_packed_weight_that_is_no_matrix_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = torch.zeros(shape).to(torch.float8_e4m3fn)
    scene_of(tmp_path, fp8(weight=weight), FP8, target="lm_head").refuse(W, "matrix", shape)


def test_floats_that_only_have_the_name_of_a_packed_weight_are_plain(tmp_path: Path) -> None:
    tensors = {
        f"{MODULE}.W_q": noise(4, 4),
        f"{MODULE}.codes": noise(4),
        f"{MODULE}.qweight": noise(3),
        W: noise(160, 96),
    }
    scene = scene_of(tmp_path, tensors, None)
    scene.merge()
    assert factories.load_folder(scene.output).keys() == {*tensors, "lm_head.weight"}


@pytest.mark.parametrize("size", [None, [128], [128, 128, 128], [0, 128], [128.0, 128], ["128", 128], "128", [True, 1]])
def test_a_block_size_that_is_none_is_refused(size: Any, tmp_path: Path) -> None:
    scene = scene_of(tmp_path, fp8(), {**FP8, "weight_block_size": size})
    scene.refuse("config.json" if size is not None else SCALE)


def test_blocks_that_two_groups_of_layers_may_mean_are_refused(tmp_path: Path) -> None:
    section = compressed(strategy="block", block_structure=[128, 128])
    section["config_groups"]["group_1"] = {"weights": {"strategy": "block", "block_structure": [100, 128]}}
    tensors = formats.fp8(W, noise(160, 96), tail="_scale")
    scene_of(tmp_path, tensors, section).refuse(f"{W}_scale", "(100, 128)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_publish_nothing(value: float, tmp_path: Path) -> None:
    scene = scene_of(tmp_path, fp8(scale=torch.full((2, 1), value)), FP8)
    with pytest.raises(VerifyError, match="q_proj"):
        scene.merge()
    assert not scene.output.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ts: {**ts, f"{MODULE}.SCB": torch.ones(159)}, (f"{MODULE}.SCB", "(160,)", "(159,)")),
        (lambda ts: {**ts, f"{MODULE}.SCB": torch.ones(160, dtype=torch.int32)}, (f"{MODULE}.SCB", "I32")),
        (lambda ts: {k: t for k, t in ts.items() if not k.endswith("SCB")}, (W, "no scales")),
        (lambda ts: {k: t for k, t in ts.items() if k == W}, (W, "I8", "no scales")),
        (lambda ts: {k: t for k, t in ts.items() if k != W}, (f"{MODULE}.SCB", "no weight")),
        (lambda ts: {**ts, W: noise(160, 96)}, (W, "F32", f"{MODULE}.SCB")),
        (lambda ts: {**ts, W: ts[W].flatten()}, (W, "(15360,)")),
        (lambda ts: {**ts, f"{MODULE}.weight_format": torch.tensor(1, dtype=torch.uint8)}, ("layout 1",)),
        (lambda ts: {**ts, f"{MODULE}.weight_format": torch.tensor(0)}, ("weight_format", "I64")),
    ],
)
def test_int8_whose_tensors_do_not_fit_is_refused(
    change: Callable[[Tensors], Tensors], words: tuple[str, ...], tmp_path: Path
) -> None:
    scene_of(tmp_path, change(formats.int8(W, noise(160, 96))), INT8).refuse(*words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ts: {k: t for k, t in ts.items() if not k.endswith("_scales")}, (f"{EXPERTS}_blocks", "_scales")),
        (lambda ts: {k: t for k, t in ts.items() if not k.endswith("_blocks")}, (f"{EXPERTS}_scales", "_blocks")),
        (lambda ts: {k: t[..., :1].contiguous() for k, t in ts.items()}, (f"{EXPERTS}_blocks", "(2, 40, 2, 1)")),
        (lambda ts: {**ts, f"{EXPERTS}_scales": torch.ones(2, 40, 2)}, (f"{EXPERTS}_scales", "F32")),
        (
            lambda ts: {**ts, f"{EXPERTS}_scales": ts[f"{EXPERTS}_scales"][:, :39].contiguous()},
            ("(2, 39, 2)", "(2, 40, 2)"),
        ),
        (lambda ts: {**ts, EXPERTS: noise(2, 64, 40)}, (EXPERTS, "twice")),
    ],
)
def test_mxfp4_whose_tensors_do_not_fit_is_refused(
    change: Callable[[Tensors], Tensors], words: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = change(formats.mxfp4(EXPERTS, noise(2, 64, 40)))
    scene_of(tmp_path, tensors, MXFP4, target="lm_head").refuse(*words)


@pytest.mark.parametrize("zero", [torch.ones(159, 1), torch.zeros(160, 1), torch.zeros(1, 160, dtype=torch.int8)])
def test_zero_points_of_another_dtype_or_shape_are_refused(zero: Tensor, tmp_path: Path) -> None:
    codes = torch.ones(160, 96, dtype=torch.int8)
    tensors = {W: codes, f"{W}_scale": torch.ones(160, 1), f"{W}_zero_point": zero}
    scene_of(tmp_path, tensors, compressed("int", strategy="channel")).refuse(f"{W}_zero_point", "expected I8")


def test_groups_in_the_order_of_activations_are_refused(tmp_path: Path) -> None:
    codes = torch.ones(160, 96, dtype=torch.int8)
    tensors = {W: codes, f"{W}_scale": torch.ones(160, 3), f"{W}_g_idx": torch.zeros(96, dtype=torch.int32)}
    section = compressed("int", strategy="group", group_size=32)
    scene_of(tmp_path, tensors, section).refuse(W, "order of activations", hint="16-bit")


SECTIONS = {
    "fp8": FP8,
    "bitsandbytes int8": INT8,
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "mxfp4": MXFP4,
}
CONTENTS: dict[str, Callable[[], Tensors]] = {
    "fp8": fp8,
    "bitsandbytes int8": lambda: formats.int8(W, noise(160, 96)),
    "nf4": lambda: factories.packed_tensors(W, noise(160, 96).bfloat16(), quant_type="nf4"),
    "mxfp4": lambda: formats.mxfp4(EXPERTS, noise(2, 64, 40)),
}


@pytest.mark.parametrize("says", SECTIONS)
@pytest.mark.parametrize("holds", CONTENTS)
def test_a_configuration_of_another_method_than_the_tensors_is_refused(says: str, holds: str, tmp_path: Path) -> None:
    scene = scene_of(tmp_path, CONTENTS[holds](), SECTIONS[says], target="lm_head")
    if says == holds:
        scene.merge()
    else:
        scene.refuse()
        scene.refuse(keep_quantized=True)


def test_integers_of_one_method_are_not_those_of_another(tmp_path: Path) -> None:
    codes = {W: torch.ones(160, 96, dtype=torch.int8), f"{W}_scale": torch.ones(160, 1)}
    scene_of(tmp_path / "a", codes, INT8).refuse(W, "int8_scaled", "bitsandbytes int8")
    packed = formats.int8(W, noise(160, 96))
    scene_of(tmp_path / "b", packed, compressed("int", strategy="channel")).refuse(W, "int8", "'compressed-tensors'")


def test_two_sections_of_different_methods_are_refused(tmp_path: Path) -> None:
    scene = scene_of(tmp_path, fp8(), FP8, text_config={"quantization_config": {"quant_method": "awq"}})
    scene.refuse("'awq'", "'fp8'", "config.json")


# What each method writes for a linear (96 inputs, 160 outputs).
FOREIGN: dict[str, tuple[dict[str, Any], Tensors]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        {
            f"{MODULE}.qweight": torch.zeros(12, 160, dtype=torch.int32),
            f"{MODULE}.qzeros": torch.zeros(1, 20, dtype=torch.int32),
            f"{MODULE}.scales": torch.ones(1, 160).half(),
            f"{MODULE}.g_idx": torch.zeros(96, dtype=torch.int32),
        },
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4},
        {
            f"{MODULE}.qweight": torch.zeros(96, 20, dtype=torch.int32),
            f"{MODULE}.qzeros": torch.zeros(1, 20, dtype=torch.int32),
            f"{MODULE}.scales": torch.ones(1, 160).half(),
        },
    ),
    "hqq": ({"quant_method": "hqq"}, {f"{MODULE}.W_q": torch.zeros(80, 96, dtype=torch.uint8)}),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        {f"{W}_qdata": torch.zeros(160, 96, dtype=torch.int8), f"{W}_scale": torch.ones(160, 1)},
    ),
    "quanto": (
        {"quant_method": "quanto"},
        {f"{W}._data": torch.zeros(160, 96, dtype=torch.int8), f"{W}._scale": torch.ones(160, 1)},
    ),
    "aqlm": (
        {"quant_method": "aqlm"},
        {f"{MODULE}.codes": torch.zeros(160, 12, 1, dtype=torch.int16), f"{MODULE}.codebooks": torch.ones(1, 4, 1, 8)},
    ),
    "bitnet": (
        {"quant_method": "bitnet"},
        {W: torch.zeros(40, 96, dtype=torch.uint8), f"{W}_scale": torch.ones(1)},
    ),
    "eetq": (
        {"quant_method": "eetq"},
        {W: torch.zeros(96, 160, dtype=torch.int8), f"{W}_scales": torch.ones(160).half()},
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {
            W: noise(160, 96).to(torch.float8_e4m3fn),
            f"{W}_scale": torch.ones(()),
            f"{MODULE}.input_scale": torch.ones(()),
        },
    ),
    "nvfp4": (
        {"quant_method": "nvfp4"},
        {
            W: torch.zeros(160, 48, dtype=torch.uint8),
            f"{W}_scale": torch.ones(160, 6).to(torch.float8_e4m3fn),
            f"{W}_scale_2": torch.ones(()),
        },
    ),
    "compressed-tensors": (
        {**compressed("int"), "format": "pack-quantized"},
        {
            f"{W}_packed": torch.zeros(160, 12, dtype=torch.int32),
            f"{W}_scale": torch.ones(160, 1).bfloat16(),
            f"{W}_shape": torch.tensor([160, 96]),
        },
    ),
    "unheard-of": ({"quant_method": "unheard-of"}, {W: torch.zeros(160, 12, dtype=torch.int32)}),
}


@pytest.mark.parametrize("method", FOREIGN)
def test_a_method_that_is_only_recognised_is_refused_by_name_and_by_tensor(method: str, tmp_path: Path) -> None:
    section, tensors = FOREIGN[method]
    scene_of(tmp_path / "all", tensors, section).refuse(method, W, hint="--keep-quantized")
    touched = scene_of(tmp_path / "touched", tensors, section)
    touched.refuse(method, W, "cannot be merged into", hint="16-bit", keep_quantized=True)
    beside = scene_of(tmp_path / "beside", tensors, section, target="lm_head")
    beside.merge(keep_quantized=True)
    found = factories.load_folder(beside.output)
    assert all(
        torch.equal(found[name].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8)) for name, t in tensors.items()
    )


def test_what_is_fused_with_a_change_and_cannot_be_dequantized_is_refused(tmp_path: Path) -> None:
    packed = FOREIGN["compressed-tensors"][1]
    other = W.replace("q_proj", "k_proj")
    tensors = formats.fp8(W, noise(160, 96), (160, 96), tail="_scale")
    tensors |= {name.replace("q_proj", "k_proj"): tensor for name, tensor in packed.items()}
    scene = scene_of(tmp_path, tensors, {**compressed(strategy="tensor"), "format": "mixed-precision"})
    scene.refuse(other, "cannot be dequantized", hint="16-bit", keep_quantized=True)


def test_a_method_that_only_a_file_beside_the_configuration_names_is_refused(tmp_path: Path) -> None:
    scene = scene_of(tmp_path, FOREIGN["modelopt"][1], None)
    (scene.base / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    scene.refuse("modelopt", W)


@pytest.mark.parametrize("method", ["gptq", "hqq", "quanto", "aqlm", "compressed-tensors"])
def test_tensors_of_a_method_are_recognised_without_a_configuration(method: str, tmp_path: Path) -> None:
    words = {"gptq": "GPTQ", "hqq": "HQQ", "quanto": "quanto", "aqlm": "AQLM"}.get(method, method)
    scene_of(tmp_path, FOREIGN[method][1], None).refuse(words, W)


def test_what_cannot_be_dequantized_is_not_packed_anew_and_the_hint_leads_to_a_merge(tmp_path: Path) -> None:
    scene = scene_of(tmp_path, FOREIGN["gptq"][1], FOREIGN["gptq"][0], target="lm_head")
    scene.refuse("'gptq'", W, hint="leave out --quantize: if the adapter changes none of them", quantize="nf4")
    scene.merge(keep_quantized=True)


def test_a_matrix_that_is_stored_transposed_and_does_not_fit_the_budget_is_refused(tmp_path: Path) -> None:
    tensors = formats.mxfp4(EXPERTS, noise(1, 2048, 2048))
    scene = scene_of(tmp_path, tensors, MXFP4, target="lm_head")
    scene.refuse("too few", memory_budget=48 << 20, hint="--memory-budget")


DTYPES = [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32, torch.float32, torch.bfloat16]
TAILS = [
    "weight",
    "weight_scale_inv",
    "weight_scale",
    "SCB",
    "weight_format",
    "weight_blocks",
    "weight_scales",
    "qweight",
]
TAILS += ["weight_zero_point", "weight_packed", "input_scale", "scale", "weight.absmax", "W_q", "bias"]


@given(
    st.dictionaries(
        st.sampled_from(TAILS),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.sampled_from([0, 1, 2, 16, 32, 96, 160]), max_size=4)),
        max_size=5,
    ),
    st.sampled_from([None, *SECTIONS.values(), compressed(), {"quant_method": "gptq"}]),
    st.sampled_from(["llama", "gpt2"]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_of_companions_is_read_or_refused_by_name(
    tmp_path: Path, tails: dict[str, Any], section: Any, model_type: str
) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    module = MODULE.replace("q_proj", "c_attn")
    tensors = {f"{module}.{tail}": torch.zeros(shape).to(dtype) for tail, (dtype, shape) in tails.items()}
    scene = scene_of(tmp_path, tensors, section, target="lm_head", model_type=model_type)
    for keep in (False, True):
        error = scene.try_plan(keep_quantized=keep)
        assert error is None or any(word in str(error) for word in (module, "config.json"))
        if error is None:
            scene.merge(keep_quantized=keep)
            shutil.rmtree(scene.output)
