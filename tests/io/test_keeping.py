"""--keep-quantized: what nothing changes stays packed byte for byte, and loaders read the rest as what it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distmerge
from tests import formats, oracles
from tests.conftest import digests
from tests.factories import (
    LINEARS,
    build_llama,
    edit_json,
    load_folder,
    merge,
    packed_tensors,
    save_adapter,
    save_base,
    save_packed_base,
    write_adapter,
)
from tests.formats import FP8, INT8, MXFP4, compressed, noise

TOKENS = torch.arange(12)[None]
SMALL_FP8 = {**FP8, "weight_block_size": [32, 32]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # bitsandbytes' forward pass on the CPU needs whole blocks in every row.
    return save_base(tmp_path_factory.mktemp("dense") / "llama", intermediate_size=192)


@pytest.fixture(scope="module")
def bases(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same Llama in several formats."""
    root = tmp_path_factory.mktemp("bases")

    def rows(name: str, weight: Tensor) -> dict[str, Tensor]:
        return formats.fp8(name, weight, (1, weight.shape[1]), tail="_scale")

    def small(name: str, weight: Tensor) -> dict[str, Tensor]:
        return formats.fp8(name, weight, (32, 32))

    return {
        "nf4": save_packed_base(root / "nf4", intermediate_size=192),
        "int8": formats.llama_in(root / "int8", dense, formats.int8, INT8),
        "fp8": formats.llama_in(root / "fp8", dense, small, SMALL_FP8),
        "fbgemm": formats.llama_in(root / "fbgemm", dense, rows, {"quant_method": "fbgemm_fp8"}),
        "compressed": formats.llama_in(root / "compressed", dense, rows, compressed(strategy="channel")),
    }


def tuned(folder: Path, *targets: str, **fields: Any) -> Path:
    return save_adapter(
        folder, target_modules=list(targets), model=build_llama(torch.float32, intermediate_size=192), **fields
    )


def parts(tensors: dict[str, Tensor], module: str) -> set[str]:
    return {name for name in tensors if name.startswith(f"{module}.")}


def assert_same_bytes(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    assert found.flatten().view(torch.uint8).tolist() == expected.flatten().view(torch.uint8).tolist(), name


KINDS = ["nf4", "int8", "fp8", "fbgemm", "compressed"]
SKIPS = {"nf4": "llm_int8_skip_modules", "int8": "llm_int8_skip_modules", "compressed": "ignore"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_nothing_changes_keeps_its_bytes_and_what_is_fused_with_a_change_is_dense(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = tuned(tmp_path / "lora", "q_proj", "down_proj")
    out, plain = (merge(bases[kind], adapter, tmp_path / str(keep), keep_quantized=keep) for keep in (True, False))
    found, base, every = load_folder(out), load_folder(bases[kind]), load_folder(plain)
    changed = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("mlp.down_proj", "self_attn.q_proj")]
    beside = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("k_proj", "v_proj")]
    for module in (*changed, *beside):
        assert parts(found, module) == {f"{module}.weight"}
        assert_same_bytes(found[f"{module}.weight"], every[f"{module}.weight"], module)
    kept = {name for name in base if not any(name in parts(base, module) for module in (*changed, *beside))}
    assert found.keys() == kept | {f"{module}.weight" for module in (*changed, *beside)}
    assert any("o_proj.weight" in name and len(parts(base, name.removesuffix(".weight"))) > 1 for name in kept)
    for name in kept:
        assert_same_bytes(found[name], base[name], name)
    section = formats.read_config(out)["quantization_config"]
    skipped = section.pop(SKIPS.get(kind, "modules_to_not_convert"))
    assert sorted(skipped) == sorted(["lm_head", *changed, *beside])
    before = formats.read_config(bases[kind])["quantization_config"]
    before.pop(SKIPS.get(kind, "modules_to_not_convert"), None)
    assert section == before


@pytest.mark.parametrize("kind", KINDS)
def test_verify_recomputes_an_output_that_is_partly_packed(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tuned(tmp_path / "lora", "up_proj")
    out = merge(bases[kind], adapter, tmp_path / "out", keep_quantized=True)
    found = distmerge.verify(out, base=bases[kind], adapters=(distmerge.AdapterChoice(folder=adapter),))
    assert found.recomputed is not None
    assert found.recomputed.num_tensors == 2
    assert found.recomputed.max_ulp_beyond_noise <= 0.5


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_transformers_loads_it_and_it_answers_as_base_and_adapter_do(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    import transformers
    from peft import PeftModel

    adapter = tuned(tmp_path / "lora", "o_proj", scale=0.3)
    out = merge(bases[kind], adapter, tmp_path / "out", keep_quantized=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[kind]).eval()
    with torch.no_grad():
        before = base(TOKENS).logits
    unmerged = PeftModel.from_pretrained(base, adapter).eval()
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    packed = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "fp8": "Linear"}[kind]
    layer = merged.model.layers[0]
    assert type(layer.self_attn.o_proj).__name__ == "Linear"
    assert type(layer.self_attn.q_proj).__name__ == type(layer.mlp.up_proj).__name__ == packed
    assert type(merged.lm_head).__name__ == "Linear"
    with torch.no_grad():
        expected, found = unmerged(TOKENS).logits, merged.eval()(TOKENS).logits
    # Int8 multiplies rounded activations: the packed base's own answer is not that of its dequantized weights.
    assert (found - expected).abs().max() < 0.1 * (expected - before).abs().max()


@pytest.mark.parametrize("kind", ["nf4", "fp8", "fbgemm"])
def test_loaders_take_for_packed_exactly_what_is_packed(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    adapter = tuned(tmp_path / "lora", "gate_proj")
    edit_json(adapter / "adapter_config.json", layers_to_transform=[1])
    out = merge(bases[kind], adapter, tmp_path / "out", keep_quantized=True)
    skips = formats.read_config(out)["quantization_config"][SKIPS.get(kind, "modules_to_not_convert")]
    linears = [name for name, module in build_llama(intermediate_size=192).named_modules() if "_proj" in name]
    tensors = load_folder(out)
    packed = {name for name in linears if len(parts(tensors, name)) > 1}
    assert {name for name in [*linears, "lm_head"] if should_convert_module(name, skips)} == packed
    assert 0 < len(packed) < len(linears)


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_goes_when_nothing_is_left_packed(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tuned(tmp_path / "lora", *LINEARS)
    out, plain = (merge(bases[kind], adapter, tmp_path / str(keep), keep_quantized=keep) for keep in (True, False))
    assert "quantization_config" not in formats.read_config(out)
    assert digests(out) == digests(plain)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_dtype_is_for_plain_tensors_and_never_for_companions(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tuned(tmp_path / "lora", "q_proj")
    out = merge(bases[kind], adapter, tmp_path / "out", keep_quantized=True, dtype="float16")
    found, base = load_folder(out), load_folder(bases[kind])
    for name in parts(base, "model.layers.0.mlp.up_proj"):
        assert_same_bytes(found[name], base[name], name)
    assert found["model.norm.weight"].dtype == found["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float16
    assert formats.read_config(out)["dtype"] == "float16"


def test_all_experts_of_a_layer_are_packed_alike_and_skipped_as_one(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for layer in (0, 1):
        for expert in (0, 1):
            for name in ("gate_proj", "up_proj", "down_proj"):
                tensors |= formats.fp8(f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight", noise(64, 64))
    base = formats.write(tmp_path / "base", tensors, {**FP8, "modules_to_not_convert": ["lm_head"]})
    module = "model.layers.1.mlp.experts.0.up_proj"
    adapter = write_adapter(tmp_path / "lora", {module: (noise(2, 64), noise(64, 2))})
    out = merge(base, adapter, tmp_path / "out", keep_quantized=True)
    found = load_folder(out)
    assert {name for name in found if ".layers.0." in name} == {name for name in tensors if ".layers.0." in name}
    assert not any(name.endswith("scale_inv") for name in found if ".layers.1." in name)
    skipped = formats.read_config(out)["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["lm_head", "model.layers.1.mlp.experts"]


def test_mxfp4_experts_that_nothing_changes_stay_and_the_others_are_skipped(tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    tensors: dict[str, Tensor] = {}
    for layer in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            tensors |= formats.mxfp4(f"model.layers.{layer}.mlp.experts.{name}", noise(2, 64, 96))
    base = formats.write(tmp_path / "base", tensors, MXFP4)
    path = "model.layers.0.mlp.experts"
    pair = (noise(2 * 2, 64), noise(96, 2 * 2))
    adapter = write_adapter(tmp_path / "lora", {path: pair}, target_parameters=["mlp.experts.down_proj"])
    edit_json(adapter / "adapter_config.json", target_modules=[], r=2)
    out = merge(base, adapter, tmp_path / "out", keep_quantized=True, expert_b_order="peft")
    found = load_folder(out)
    assert found.keys() == {
        *(name for name in tensors if ".layers.1." in name),
        *(f"{path}.{name}" for name in ("gate_up_proj", "down_proj")),
    }
    dense = formats.dense_mxfp4(tensors, f"{path}.gate_up_proj")
    assert torch.equal(found[f"{path}.gate_up_proj"], dense)
    skips = formats.read_config(out)["quantization_config"]["modules_to_not_convert"]
    assert skips[:2] == MXFP4["modules_to_not_convert"]
    assert not should_convert_module(path, skips)
    assert should_convert_module("model.layers.1.mlp.experts", skips)


def test_a_method_that_is_only_recognised_stays_where_nothing_of_it_is_changed(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    gptq = {
        f"{module}.qweight": torch.zeros(8, 64, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        f"{module}.scales": noise(1, 64).half(),
        f"{module}.g_idx": torch.zeros(64, dtype=torch.int32),
        f"{module}.bias": noise(64).half(),
    }
    base = formats.write(tmp_path / "base", {**gptq, "lm_head.weight": noise(96, 64)}, {"quant_method": "gptq"})
    (base / "quantize_config.json").write_text('{"bits": 4}')
    adapter = write_adapter(tmp_path / "lora", {"lm_head": (noise(2, 64), noise(96, 2))})
    out = merge(base, adapter, tmp_path / "out", keep_quantized=True)
    oracles.assert_merged(out, load_folder(base), [(adapter, 1.0)])
    assert formats.read_config(out)["quantization_config"] == {"quant_method": "gptq"}
    assert (out / "quantize_config.json").exists()


def test_files_about_a_packing_that_is_gone_are_not_copied(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["fp8"], tmp_path / "base"))
    (base / "hf_quant_config.json").write_text("{}")
    adapter = tuned(tmp_path / "lora", "q_proj")
    assert not (merge(base, adapter, tmp_path / "dense") / "hf_quant_config.json").exists()
    assert (merge(base, adapter, tmp_path / "kept", keep_quantized=True) / "hf_quant_config.json").exists()


def test_repeated_layers_have_companions_of_their_own(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for layer in (0, 1):
        for name in ("q_proj", "o_proj"):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            tensors |= packed_tensors(key, noise(64, 64, seed=layer).bfloat16(), quant_type="nf4")
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = formats.write(tmp_path / "base", tensors, section, num_hidden_layers=2)
    module = "model.layers.2.self_attn.q_proj"
    adapter = write_adapter(
        tmp_path / "lora", {module: (noise(2, 64), noise(64, 2))}, layer_replication=[[0, 2], [0, 1]]
    )
    found = load_folder(merge(base, adapter, tmp_path / "out", keep_quantized=True))
    for name in parts(tensors, "model.layers.0.self_attn.o_proj"):
        assert_same_bytes(found[name.replace(".0.", ".2.")], tensors[name], name)
    assert parts(found, "model.layers.2.self_attn.q_proj") == {"model.layers.2.self_attn.q_proj.weight"}
