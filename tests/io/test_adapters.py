"""Adapters as PEFT saves them: scaling, patterns, targets, dtypes, several at once, and PEFT's own answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmerge.adapter.peft_adapter import AdapterOptions, read_adapter
from tests import oracles
from tests.factories import LINEARS, load_folder, merge, rewrite_adapter, save_adapter, write_adapter

TOKENS = torch.tensor([[5, 17, 3, 90, 41, 2, 66, 8], [1, 2, 3, 4, 5, 6, 7, 95]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def loaded(folder: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def unmerged(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded(base), adapter)


FIELDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 9, "alpha": 2},
    "patterns": {
        "rank_pattern": {"q_proj": 7, r"layers\.1\..*\.up_proj": 3},
        "alpha_pattern": {"down_proj": 11, r"layers\.0\.self_attn\.v_proj": 1},
    },
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "regex": {"target_modules": r".*\.1\.(self_attn|mlp)\.(q|down)_proj"},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "layers by pattern": {"layers_to_transform": 0, "layers_pattern": "layers", "target_modules": list(LINEARS)},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "r above the size": {"r": 80, "alpha": 16, "target_modules": ["k_proj"], "scale": 0.2},
    "negative alpha": {"alpha": -3},
}


@pytest.mark.parametrize("case", sorted(FIELDS))
def test_the_merge_is_that_of_float64_and_its_logits_are_those_of_peft(
    case: str, fp32_base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "lora", model=loaded(fp32_base), **FIELDS[case])
    out = merge(fp32_base, adapter, tmp_path / "out")
    oracles.assert_merged(out, load_folder(fp32_base), [(adapter, 1.0)])
    expected = logits(unmerged(fp32_base, adapter))
    assert torch.allclose(logits(loaded(out)), expected, rtol=1e-4, atol=2e-6)
    assert (expected - logits(loaded(fp32_base))).abs().max() > 1e-3, "the adapter must be visible"


def test_a_bfloat16_merge_is_bit_for_bit_what_peft_merges(base: Path, adapter: Path, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    ours = load_folder(merge(base, adapter, tmp_path / "out"))
    different = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    assert different <= 1e-3 * sum(tensor.numel() for tensor in ours.values()), "other orders of summing, seldom"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_16_bits_are_multiplied_in_float32(dtype: torch.dtype, fp32_base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora")
    rewrite_adapter(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    oracles.assert_merged(merge(fp32_base, adapter, tmp_path / "out"), load_folder(fp32_base), [(adapter, 1.0)])


def test_factors_of_two_dtypes_are_merged(fp32_base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora")
    rewrite_adapter(adapter, lambda all_: {n: t.bfloat16() if ".lora_A." in n else t for n, t in all_.items()})
    oracles.assert_merged(merge(fp32_base, adapter, tmp_path / "out"), load_folder(fp32_base), [(adapter, 1.0)])


def test_keys_that_name_the_adapter_mean_the_same(base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    named = Path(shutil.copytree(adapter, tmp_path / "lora"))
    rewrite_adapter(named, lambda all_: {n.replace(".weight", ".default.weight"): t for n, t in all_.items()})
    assert "lora_A.default.weight" in next(iter(sorted(load_file(named / "adapter_model.safetensors"))))
    ours, theirs = load_folder(merge(base, named, tmp_path / "out")), load_folder(merged)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("which", ["base", "fp32_base", "packed_base"])
def test_several_adapters_are_summed_and_rounded_once(
    which: str, adapter: Path, other_adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    weighted = [(adapter, 0.7), (other_adapter, -0.4)]
    out = merge(base, weighted, tmp_path / "out")
    oracles.assert_merged(out, oracles.dense(load_folder(base)), weighted)


def test_an_adapter_twice_is_its_delta_twice(fp32_base: Path, adapter: Path, tmp_path: Path) -> None:
    weighted = [(adapter, 0.5), (adapter, 1.25)]
    oracles.assert_merged(merge(fp32_base, weighted, tmp_path / "out"), load_folder(fp32_base), weighted)


def test_lora_alpha_replaces_that_of_the_configuration(fp32_base: Path, adapter: Path, tmp_path: Path) -> None:
    out = merge(fp32_base, adapter, tmp_path / "out", lora_alpha=9.0)
    oracles.assert_merged(out, load_folder(fp32_base), [(adapter, 9 / 6)])


def test_a_delta_of_zero_leaves_every_bit_of_its_tensor(base: Path, adapter: Path, tmp_path: Path) -> None:
    zero = Path(shutil.copytree(adapter, tmp_path / "lora"))
    rewrite_adapter(zero, lambda all_: {n: t * ("q_proj" not in n or ".lora_A." in n) for n, t in all_.items()})
    ours, before = load_folder(merge(base, zero, tmp_path / "out")), load_folder(base)
    for name in before:
        assert torch.equal(ours[name], before[name]) == ("q_proj" in name or "_proj" not in name), name


def test_a_merged_packed_base_loads_with_nothing_missing_and_gives_the_logits_of_its_adapter(
    packed_base: Path, adapter: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    from tests.factories import build_llama

    out = merge(packed_base, adapter, tmp_path / "out", dtype="float32")
    model, info = loaded(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert not getattr(model, "is_quantized", False)
    dense = build_llama(torch.float32)
    dense.load_state_dict({name: t.float() for name, t in oracles.dense(load_folder(packed_base)).items()})
    assert torch.allclose(logits(model), logits(PeftModel.from_pretrained(dense, adapter)), rtol=1e-4, atol=2e-6)


def test_a_merged_packed_base_loads_in_its_own_dtype(merged_nf4: Path) -> None:
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(merged_nf4, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert json.loads((merged_nf4 / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_an_adapter_that_names_each_of_2000_modules_in_its_patterns_is_read(tmp_path: Path) -> None:
    ranks = {f"model.layers.{number // 8}.experts.{number % 8}.up_proj": 1 + number % 3 for number in range(2000)}
    pairs = {module: (torch.ones(r, 2), torch.ones(2, r)) for module, r in ranks.items()}
    patterns = {"rank_pattern": ranks, "alpha_pattern": {module: 2.0 * r for module, r in ranks.items()}}
    lora = read_adapter(write_adapter(tmp_path / "lora", pairs, **patterns), AdapterOptions())
    assert len(lora.modules) == 2000
