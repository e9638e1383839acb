"""Packed bases of every format that is read: dequantized bit for bit by the format's formula, and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import formats, oracles
from tests.conftest import digests
from tests.factories import load_folder, merge, split_files, write_adapter
from tests.formats import FP8, INT8, MXFP4, compressed, noise

W = "model.layers.0.mlp.down_proj.weight"
MODULE = W.removesuffix(".weight")
OTHER = "other.weight"


def check(
    folder: Path, tensors: dict[str, Tensor], section: dict[str, Any] | None, expected: dict[str, Tensor]
) -> None:
    """Merging into `tensors` gives `expected` where nothing is changed, and the float64 sum rounded once where it is;
    of the companions nothing is left."""
    name, weight = next(iter(expected.items()))
    base = formats.write(folder / "base", {**tensors, OTHER: noise(8, 6)}, section)
    aside = write_adapter(folder / "aside", {"other": (noise(2, 6), noise(8, 2))})
    found = load_folder(merge(base, aside, folder / "dense"))
    assert found.keys() == {*expected, OTHER}
    for key, values in expected.items():
        assert found[key].dtype == values.dtype
        assert torch.equal(found[key].view(torch.int16), values.view(torch.int16)), key
    if name.endswith(".weight") and weight.dim() == 2:
        rows, cols = weight.shape
        adapter = write_adapter(folder / "lora", {name.removesuffix(".weight"): (noise(3, cols), noise(rows, 3))})
        out = merge(base, adapter, folder / "merged")
        oracles.assert_merged(out, {**expected, OTHER: noise(8, 6)}, [(adapter, 1.0)])
        assert "quantization_config" not in formats.read_config(out)


# Several shapes cross blocks of half a million elements within a row of scales, and none is a multiple of its blocks.
@pytest.mark.parametrize("scales", ["F32", "BF16", "F16", "F8_E8M0", "U8"])
@pytest.mark.parametrize("shape", [(576, 384), (130, 5001), (3, 300_007), (1, 7)], ids=str)
def test_fp8_in_blocks_is_dequantized_by_its_formula_also_in_ragged_blocks(
    shape: tuple[int, int], scales: str, tmp_path: Path
) -> None:
    tensors = formats.fp8(W, noise(*shape), scales=scales)
    check(tmp_path, tensors, FP8, {W: formats.dense_fp8(tensors, W, (128, 128))})


@pytest.mark.parametrize("block", [(1, 32), (64, 16), (7, 5), (1024, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_blocks_are_those_that_the_configuration_names(
    block: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = formats.fp8(W, noise(150, 203), block, dtype=dtype)
    section = {**FP8, "weight_block_size": list(block)}
    check(tmp_path, tensors, section, {W: formats.dense_fp8(tensors, W, block)})


@pytest.mark.parametrize(
    ("block", "method", "scales"), [((128, 128), "fp8", "F32"), ((1, 32), "mxfp8", "U8")], ids=["fp8", "mxfp8"]
)
def test_blocks_are_the_methods_own_where_the_configuration_names_none(
    block: tuple[int, int], method: str, scales: str, tmp_path: Path
) -> None:
    tensors = formats.fp8(W, noise(150, 203), block, scales=scales)
    check(tmp_path, tensors, {"quant_method": method}, {W: formats.dense_fp8(tensors, W, block)})


@pytest.mark.parametrize("stored", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("tail", "section"),
    [("_scale_inv", FP8), ("_scale", compressed(strategy="tensor")), ("_scale_inv", None)],
    ids=["fp8", "compressed-tensors", "no section"],
)
def test_one_scale_stands_for_the_whole_tensor(
    stored: tuple[int, ...], tail: str, section: dict[str, Any] | None, tmp_path: Path
) -> None:
    tensors = formats.fp8(W, noise(300, 2100), (300, 2100), tail=tail)
    tensors[W + tail] = tensors[W + tail].reshape(stored)
    check(tmp_path, tensors, section, {W: formats.dense_fp8(tensors, W, (300, 2100), tail=tail)})


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    "section", [{"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, compressed(strategy="channel")], ids=str
)
def test_one_scale_stands_for_a_row(section: dict[str, Any], flat: bool, tmp_path: Path) -> None:
    tensors = formats.fp8(W, noise(700, 1001), (1, 1001), tail="_scale")
    expected = formats.dense_fp8(tensors, W, (1, 1001), tail="_scale")
    if flat:
        tensors[f"{W}_scale"] = tensors[f"{W}_scale"].flatten()
    check(tmp_path, tensors, section, {W: expected})


@pytest.mark.parametrize("size", [16, 24, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_integers_of_compressed_tensors_are_dequantized_in_groups(size: int, asymmetric: bool, tmp_path: Path) -> None:
    shape = (300, 1000)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    grid = (300, -(-1000 // size))
    tensors = {W: codes, f"{W}_scale": (noise(*grid).abs() + 0.01).bfloat16()}
    zeros = torch.randint(-128, 128, grid, generator=generator, dtype=torch.int8)
    if asymmetric:
        tensors[f"{W}_zero_point"] = zeros
    shift = formats.spread(zeros.float(), (1, size), shape) * asymmetric
    expected = (codes.float() - shift) * formats.spread(tensors[f"{W}_scale"].float(), (1, size), shape)
    section = compressed("int", strategy="group", group_size=size, symmetric=not asymmetric)
    check(tmp_path, tensors, section, {W: expected.bfloat16()})


@pytest.mark.parametrize("shape", [(40, 96), (700, 1501)], ids=str)
def test_int8_of_bitsandbytes_is_dequantized_by_its_formula(shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = formats.int8(W, noise(*shape))
    check(tmp_path, tensors, INT8, {W: formats.dense_int8(tensors, W)})


@pytest.mark.parametrize("block", [(128, 128), (1, 1)], ids=["blocks", "one each"])
@pytest.mark.parametrize("stored", [None, (3,)], ids=["grid", "flat"])
def test_fused_experts_have_their_scales_beside_them(
    block: tuple[int, int], stored: tuple[int, ...] | None, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = (3, 260, 1100)
    block = block if block != (1, 1) else shape[1:]
    tensors = formats.fp8(name, noise(*shape), block)
    expected = formats.dense_fp8(tensors, name, block)
    if stored and tensors[f"{name}_scale_inv"].numel() == 3:
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].reshape(stored)
    tensors[f"{name}_activation_scale"] = torch.ones(3)
    check(tmp_path, tensors, FP8, {name: expected})


def test_one_scale_stands_for_a_column_of_each_expert(tmp_path: Path) -> None:
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    tensors = formats.fp8(name, noise(2, 130, 300), (130, 1), tail="_scale")
    assert tensors[f"{name}_scale"].shape == (2, 1, 300)
    expected = formats.dense_fp8(tensors, name, (130, 1), tail="_scale")
    check(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}, {name: expected})


@pytest.mark.parametrize("shape", [(3, 64, 40), (2, 1056, 700)], ids=str)
def test_mxfp4_experts_are_dequantized_and_transposed(shape: tuple[int, int, int], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = formats.mxfp4(name, noise(*shape))
    tensors[f"{name}_scales"][0, 0, 0] = 0  # the smallest power of two is subnormal in float32
    tensors[f"{name}_scales"][0, 1, 0] = 240
    check(tmp_path, tensors, MXFP4, {name: formats.dense_mxfp4(tensors, name)})


def test_4_bit_floats_in_bytes_are_dequantized_under_fp8(tmp_path: Path) -> None:
    name = "model.layers.0.ffn.experts.0.w1.weight"
    packed = formats.mxfp4("x", noise(1, 128, 70))
    codes, scales = packed["x_blocks"][0].flatten(-2).view(torch.int8), packed["x_scales"][0]
    tensors = {name: codes, name.replace(".weight", ".scale"): scales.view(torch.float8_e8m0fnu)}
    expected = formats.dense_mxfp4(packed, "x")[0].T.contiguous()
    check(tmp_path, tensors, {**FP8, "expert_dtype": "fp4"}, {name: expected})


PACKED: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "fp8": lambda: (formats.fp8(W, noise(300, 200)), FP8),
    "int8": lambda: (formats.int8(W, noise(300, 200)), INT8),
    "mxfp4": lambda: (formats.mxfp4("model.experts.down_proj", noise(2, 64, 40)), MXFP4),
}


@pytest.mark.parametrize("kind", PACKED)
def test_companions_may_lie_in_other_files_than_their_weight(kind: str, tmp_path: Path) -> None:
    tensors, section = PACKED[kind]()
    tensors[OTHER] = noise(8, 6)
    adapter = write_adapter(tmp_path / "lora", {"other": (noise(2, 6), noise(8, 2))})
    one = formats.write(tmp_path / "one", tensors, section)
    many = formats.write(tmp_path / "many", tensors, section)
    split_files(many, {name: f"model-{number}.safetensors" for number, name in enumerate(sorted(tensors))})
    a, b = (merge(base, adapter, tmp_path / f"out-{base.name}") for base in (one, many))
    assert {name: t.sum() for name, t in load_folder(a).items()} == {n: t.sum() for n, t in load_folder(b).items()}
    assert sorted(digests(a).values()) == sorted(digests(b).values())


def test_scales_of_activations_go_with_the_packed_weight_and_those_of_the_cache_stay(tmp_path: Path) -> None:
    tensors = formats.fp8(W, noise(300, 200), (300, 200), tail="_scale")
    beside = {f"{MODULE}.{tail}": torch.ones(1) for tail in ("input_scale", "output_scale", "input_scale_ub")}
    cache = {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.0.self_attn.v_scale": torch.ones(1)}
    base = formats.write(tmp_path / "base", {**tensors, **beside, **cache}, compressed(strategy="tensor"))
    adapter = write_adapter(tmp_path / "lora", {MODULE: (noise(2, 200), noise(300, 2))})
    assert load_folder(merge(base, adapter, tmp_path / "out")).keys() == {W, *cache}


@pytest.mark.parametrize("config", [{"dtype": "float16"}, {"dtype": None, "text_config": {"torch_dtype": "float32"}}])
def test_the_output_has_the_dtype_that_the_configuration_names(config: dict[str, Any], tmp_path: Path) -> None:
    tensors = formats.fp8(W, noise(300, 200))
    base = formats.write(tmp_path / "base", tensors, FP8, **config)
    adapter = write_adapter(tmp_path / "lora", {MODULE: (noise(2, 200), noise(300, 2))})
    expected = torch.float16 if config["dtype"] else torch.float32
    assert load_folder(merge(base, adapter, tmp_path / "out"))[W].dtype == expected


def test_without_a_told_dtype_the_output_has_that_of_most_other_floats(tmp_path: Path) -> None:
    tensors = {**formats.fp8(W, noise(300, 200), (1, 1)), "model.norm.weight": noise(64).half()}
    section = {**FP8, "weight_block_size": [1, 1]}
    base = formats.write(tmp_path / "base", tensors, section, dtype=None)
    adapter = write_adapter(tmp_path / "lora", {MODULE: (noise(2, 200), noise(300, 2))})
    assert load_folder(merge(base, adapter, tmp_path / "out"))[W].dtype == torch.float16


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_packed_gpt2_is_merged_as_its_dense_layout_is(kind: str, tmp_path: Path) -> None:
    from tests.factories import packed_tensors

    name = "h.0.attn.c_attn.weight"
    stored = noise(96, 80)  # (out, in), as transformers packs a Conv1D of (in, out)
    if kind == "int8":
        tensors, section = formats.int8(name, stored), INT8
        expected = formats.dense_int8(tensors, name).T.contiguous()
    else:
        tensors = packed_tensors(name, stored.bfloat16(), quant_type=kind)
        section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        expected = oracles.dequantize_4bit(tensors, name).T.contiguous()
    base = formats.write(tmp_path / "base", {**tensors, OTHER: noise(8, 6)}, section, model_type="gpt2")
    adapter = write_adapter(tmp_path / "lora", {"h.0.attn.c_attn": (noise(3, 80), noise(96, 3))}, fan_in_fan_out=True)
    out = load_folder(merge(base, adapter, tmp_path / "out"))
    delta = oracles.deltas(adapter)[name]
    exact, magnitude = expected.double() + delta[0].T, expected.double().abs() + delta[1].T
    oracles.assert_rounded_once(out[name], exact, magnitude, terms=24)
    assert out[name].shape == (80, 96)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_is_dequantized_is_what_transformers_dequantizes(kind: str, base: Path, tmp_path: Path) -> None:
    import transformers

    if kind == "int8":
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=quantization, device_map={"": "cpu"}
        )
        model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
        packed = tmp_path / "packed"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}).dequantize()
    else:
        section = {**FP8, "weight_block_size": [32, 32]}
        packed = formats.llama_in(
            tmp_path / "packed", base, lambda name, weight: formats.fp8(name, weight, (32, 32)), section
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(packed)
    adapter = write_adapter(tmp_path / "lora", {"lm_head": (noise(2, 64), noise(96, 2))})
    found = load_folder(merge(packed, adapter, tmp_path / "out"))
    expected = theirs.state_dict()
    assert found.keys() == expected.keys()
    assert {name for name in found if not torch.equal(found[name], expected[name])} == {"lm_head.weight"}


def tuned(model: Any, folder: Path, **fields: Any) -> Any:
    """`model` with a trained LoRA of PEFT, saved in `folder`."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **fields)).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(tuned.named_parameters()):
            if "lora_" in name:
                parameter.copy_(noise(*parameter.shape, seed=number, scale=0.3))
    tuned.save_pretrained(folder)
    return tuned


def test_a_gpt_oss_in_mxfp4_answers_as_transformers_with_the_adapter_on_top(tmp_path: Path) -> None:
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "dense")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_folder(tmp_path / "dense").items():
        tensors |= formats.mxfp4(name, tensor) if name.endswith("experts.gate_up_proj") else {name: tensor}
        if name.endswith("experts.down_proj"):
            tensors.pop(name)
            tensors |= formats.mxfp4(name, tensor)
    base = formats.write(tmp_path / "base", tensors, MXFP4, **formats.read_config(tmp_path / "dense"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    peft_model = tuned(model, tmp_path / "lora", **fields)
    out = merge(base, tmp_path / "lora", tmp_path / "out")
    found = load_folder(out)
    changed = {name for name in found if not torch.equal(found[name], expected[name])}
    assert changed == {f"model.layers.0.{name}" for name in ("mlp.experts.gate_up_proj", "self_attn.q_proj.weight")}
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        unmerged, before = peft_model(tokens).logits, None
        with peft_model.disable_adapter():
            before = peft_model(tokens).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()(tokens).logits
    assert (merged - unmerged).abs().max() < 0.1 * (unmerged - before).abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gpt2_that_transformers_packed_is_merged_in_its_dense_layout(bits: int, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 16}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "dense")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    auto = transformers.AutoModelForCausalLM
    auto.from_pretrained(tmp_path / "dense", quantization_config=quantization, device_map={"": "cpu"}).save_pretrained(
        tmp_path / "base"
    )
    tuned(auto.from_pretrained(tmp_path / "dense"), tmp_path / "lora", target_modules=["c_attn"], fan_in_fan_out=True)
    found = load_folder(merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out"))
    dense, packed = load_folder(tmp_path / "dense"), load_folder(tmp_path / "base")
    name = "transformer.h.0.attn.c_attn.weight"

    def read(tensors: dict[str, Tensor], key: str) -> Tensor:
        if bits == 4:
            return oracles.dequantize_4bit(tensors, key)
        return formats.dense_int8(tensors, key, found[key].dtype)

    for other in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        key = f"transformer.h.0.{other}.weight"
        assert found[key].shape == dense[key].shape
        assert torch.equal(found[key], read(packed, key).T.to(found[key].dtype)), key
    delta = oracles.deltas(tmp_path / "lora")[name]
    stored = read(packed, name).T.to(found[name].dtype).double()
    oracles.assert_rounded_once(found[name], stored + delta[0].T, stored.abs() + delta[1].T, terms=24)


@pytest.mark.parametrize("kind", PACKED)
def test_the_bytes_do_not_depend_on_the_budget(kind: str, tmp_path: Path) -> None:
    tensors, section = PACKED[kind]()
    tensors = {f"{name}": tensor for name, tensor in tensors.items()}
    if kind == "mxfp4":
        tensors = formats.mxfp4("model.experts.down_proj", noise(3, 512, 1100))
    base = formats.write(tmp_path / "base", {**tensors, OTHER: noise(2000, 600)}, section)
    adapter = write_adapter(tmp_path / "lora", {"other": (noise(2, 600), noise(2000, 2))})
    budgets = ["20MiB", "1GiB"]
    outs = [merge(base, adapter, tmp_path / b, memory_budget=int(b[:-3]) << (20 if "M" in b else 30)) for b in budgets]
    assert digests(outs[0]) == digests(outs[1])


@pytest.mark.parametrize("kind", PACKED)
def test_inspect_names_the_format(kind: str, tmp_path: Path) -> None:
    from distmerge.inspection import inspect

    tensors, section = PACKED[kind]()
    facts = inspect(formats.write(tmp_path / "base", tensors, section))
    assert facts["formats"] == {f"{kind} (BF16)": 1}
    assert facts["parameters"] == {"fp8": 60_000, "int8": 60_000, "mxfp4": 5120}[kind]


def test_plan_and_card_name_the_format_and_what_stays_packed(tmp_path: Path) -> None:
    import distmerge
    from distmerge.report.table import plan_facts, plan_table

    tensors = {**formats.fp8(W, noise(300, 200)), **formats.fp8(W.replace("down", "up"), noise(300, 200))}
    base = formats.write(tmp_path / "base", tensors, FP8)
    adapter = write_adapter(tmp_path / "lora", {MODULE: (noise(2, 200), noise(300, 2))})
    choice = distmerge.AdapterChoice(folder=adapter)
    for keep in (False, True):
        config = distmerge.MergeConfig(
            base=base, adapters=(choice,), output=tmp_path / str(keep), device="cpu", keep_quantized=keep
        )
        facts = plan_facts(distmerge.plan(config), config, wanted_lanes=1, room_nbytes=0, nproc=1)
        table = plan_table(facts)
        assert f"{1 if keep else 2} tensors are dequantized from fp8" in table
        assert ("1 packed tensors stay packed" in table) is keep
        distmerge.merge(config)
        card = (config.output / "README.md").read_text()
        assert "packed in fp8" in card
        assert "4 bits" not in card
        assert ("still packed" in card) is keep
