"""A 16-bit base read through 4 bits: the same bytes as the real packed checkpoint gives, whatever the packing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import distmerge
from distmerge.adapter.naming.linears import packed_linears
from distmerge.checkpoint.base import read_base
from distmerge.checkpoint.packing import Simulated
from distmerge.dense import Dense
from distmerge.errors import InputError, UsageError, VerifyError
from distmerge.reader import Reader
from distmerge.report.table import plan_facts, plan_table
from tests import models, oracles
from tests.conftest import digests
from tests.factories import (
    build_llama,
    edit_json,
    load_folder,
    merge,
    packed_tensors,
    save_adapter,
    save_base,
    write_adapter,
    write_base,
)

# Rows that are no multiple of a block, and a matrix of several blocks of the merge.
ODD = {"hidden_size": 40, "intermediate_size": 91, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 22}
LARGE = {"hidden_size": 520, "intermediate_size": 1501, "num_attention_heads": 2, "num_key_value_heads": 2}
LINEAR = "model.layers.0.mlp.down_proj"


def packed(dense: Path, folder: Path, *, skip: tuple[str, ...] = (), blocksize: int = 64, **options: Any) -> Path:
    """The model in `dense` loaded in 4 bits by transformers and saved; transformers packs in blocks of 64, for others
    the same linears are packed again by bitsandbytes itself."""
    import transformers

    tensors = load_folder(dense)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options["quant_type"],
        bnb_4bit_use_double_quant=options["compress_statistics"],
        llm_int8_skip_modules=list(skip) or None,
    )
    dtype = next(iter(tensors.values())).dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    if blocksize != 64:
        found: dict[str, Tensor] = {}
        names = load_folder(folder).keys()
        for name, tensor in tensors.items():
            linear = f"{name}.quant_map" in names
            found |= packed_tensors(name, tensor, blocksize=blocksize, **options) if linear else {name: tensor}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same(left: Path, right: Path) -> None:
    """Every tensor has the same dtype, shape and bytes in both outputs."""
    one, other = load_folder(left), load_folder(right)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


OPTIONS = [
    ("nf4", True, 64, torch.bfloat16),
    ("nf4", True, 64, torch.float16),
    ("nf4", True, 64, torch.float32),
    ("fp4", True, 64, torch.bfloat16),
    ("nf4", False, 64, torch.bfloat16),
    ("fp4", False, 128, torch.float16),
    ("nf4", True, 128, torch.bfloat16),
    ("nf4", True, 4096, torch.float32),
]


CASES = [*((ODD, options) for options in OPTIONS), *((LARGE, OPTIONS[number]) for number in (0, 4, 6))]


def small(folder: Path, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> tuple[Path, Path]:
    """A Llama of one layer, and a LoRA on all of its linears or on `target_modules`."""
    target = {"target_modules": sizes.pop("target_modules")} if "target_modules" in sizes else {}
    sizes = {**ODD, "num_hidden_layers": 1, **sizes}
    dense = save_base(folder / "dense", dtype, **sizes)
    return dense, save_adapter(folder / "lora", model=build_llama(torch.float32, **sizes), **target)


@pytest.mark.parametrize(("sizes", "options"), CASES, ids=str)
def test_a_simulated_base_gives_the_bytes_that_the_packed_one_gives(
    sizes: dict[str, int], options: tuple[str, bool, int, torch.dtype], tmp_path: Path
) -> None:
    kind, double, blocksize, dtype = options
    dense, adapter = small(tmp_path, dtype, **sizes)
    base = packed(dense, tmp_path / "packed", quant_type=kind, compress_statistics=double, blocksize=blocksize)
    chosen = {"simulate_quant": kind, "quant_double": double, "quant_blocksize": blocksize}
    out = merge(dense, adapter, tmp_path / "out", **chosen)
    assert_same(out, merge(base, adapter, tmp_path / "expected"))
    plain = load_folder(merge(dense, adapter, tmp_path / "plain"))
    assert not torch.equal(load_folder(out)[f"{LINEAR}.weight"], plain[f"{LINEAR}.weight"])


def test_linears_that_no_adapter_touches_are_simulated_too_and_skipped_ones_are_not(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path, target_modules=["q_proj"])
    options = {"quant_type": "nf4", "compress_statistics": True}
    for number, skip in enumerate([(), ("down_proj", "lm_head"), ("k_proj",)]):
        base = packed(dense, tmp_path / f"packed-{number}", skip=skip, **options)
        out = merge(dense, adapter, tmp_path / f"out-{number}", simulate_quant="nf4", quant_skip=skip)
        assert_same(out, merge(base, adapter, tmp_path / f"expected-{number}"))
        same = torch.equal(load_folder(out)[f"{LINEAR}.weight"], load_folder(dense)[f"{LINEAR}.weight"])
        assert same == ("down_proj" in skip)


def test_a_class_of_transposed_linears_is_simulated(tmp_path: Path) -> None:
    dense = models.save("gpt2", tmp_path / "dense")
    model = models.build("gpt2")
    fields = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapter = save_adapter(tmp_path / "lora", model=model, **fields)
    base = packed(dense, tmp_path / "packed", quant_type="nf4", compress_statistics=True)
    out = merge(dense, adapter, tmp_path / "out", simulate_quant="nf4")
    assert_same(out, merge(base, adapter, tmp_path / "expected"))


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe", "llava"])
def test_models_of_other_classes_are_simulated(name: str, tmp_path: Path) -> None:
    import transformers

    dense = models.save(name, tmp_path / "dense")
    kind = getattr(transformers, json.loads((dense / "config.json").read_text())["architectures"][0])
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    loaded = kind.from_pretrained(dense, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
    loaded.save_pretrained(tmp_path / "packed")
    head = next(module for module in packed_linears(read_base(dense)) if module.endswith("q_proj.weight"))
    cols, rows = load_folder(dense)[head].shape[::-1]
    factors = (torch.randn(2, cols) * 0.1, torch.randn(rows, 2) * 0.1)
    adapter = write_adapter(tmp_path / "lora", {head.removesuffix(".weight"): factors})
    out = merge(dense, adapter, tmp_path / "out", simulate_quant="nf4")
    assert_same(out, merge(tmp_path / "packed", adapter, tmp_path / "expected"))


@pytest.mark.parametrize(
    ("own", "compute"),
    [(torch.bfloat16, "float16"), (torch.float16, "bfloat16"), (torch.float32, "bfloat16"), (torch.float32, "float16")],
    ids=str,
)
def test_values_are_rounded_once_more_to_what_training_computed_in(
    own: torch.dtype, compute: str, tmp_path: Path
) -> None:
    dense, adapter = small(tmp_path, own)
    base = packed(dense, tmp_path / "packed", quant_type="nf4", compress_statistics=True)
    found = oracles.dense(load_folder(base))
    linears = packed_linears(read_base(base))
    seen = {
        name: tensor.to(getattr(torch, compute)).to(own) if name in linears else tensor
        for name, tensor in found.items()
    }
    out = merge(dense, adapter, tmp_path / "out", simulate_quant="nf4", quant_compute_dtype=compute)
    oracles.assert_merged(out, seen, [(adapter, 1.0)])


def test_dtype_casts_what_was_simulated_in_the_base_s_own_dtype(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path, target_modules=["q_proj", "up_proj"])
    base = packed(dense, tmp_path / "packed", quant_type="nf4", compress_statistics=True)
    out = merge(dense, adapter, tmp_path / "out", simulate_quant="nf4", dtype="float32")
    assert_same(out, merge(base, adapter, tmp_path / "expected", dtype="float32"))


def test_deltas_of_operators_and_of_combinations_meet_the_simulated_values(tmp_path: Path) -> None:
    dense, lora = small(tmp_path)
    sizes = {**ODD, "num_hidden_layers": 1}
    dora = save_adapter(tmp_path / "dora", model=build_llama(torch.float32, **sizes), use_dora=True, seed=3)
    base = packed(dense, tmp_path / "packed", quant_type="nf4", compress_statistics=True)
    for number, options in enumerate([{}, {"combine": "ties", "density": 0.4}]):
        both = [(dora, 1.0), (lora, 0.5)]
        out = merge(dense, both, tmp_path / f"out-{number}", simulate_quant="nf4", **options)
        assert_same(out, merge(base, both, tmp_path / f"expected-{number}", **options))


def test_two_memory_budgets_and_two_layouts_give_equal_tensors(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path, **LARGE)
    first = merge(dense, adapter, tmp_path / "first", simulate_quant="nf4")
    config = distmerge.MergeConfig(
        base=dense,
        adapters=(distmerge.AdapterChoice(folder=adapter),),
        output=tmp_path / "none",
        device="cpu",
        simulate_quant="nf4",
    )
    plan = distmerge.plan(config)
    smallest = plan.loading_nbytes + plan.followed_nbytes + plan.lane_nbytes + plan.held_nbytes
    second = merge(dense, adapter, tmp_path / "second", simulate_quant="nf4", memory_budget=smallest)
    assert digests(first) == digests(second)
    with pytest.raises(InputError, match="bytes are too few"):
        merge(dense, adapter, tmp_path / "third", simulate_quant="nf4", memory_budget=smallest - 1)
    third = merge(dense, adapter, tmp_path / "fourth", simulate_quant="nf4", max_shard_size=1_000_000)
    assert_same(first, third)


def test_verify_recomputes_from_the_simulated_base_and_finds_what_is_not(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path, target_modules=["q_proj", "up_proj"])
    options = {"simulate_quant": "fp4", "quant_blocksize": 32, "quant_skip": ("lm_head",)}
    out = merge(dense, adapter, tmp_path / "out", **options)
    choices = (distmerge.AdapterChoice(folder=adapter),)
    found = distmerge.verify(out, base=dense, adapters=choices).recomputed
    assert found is not None
    assert found.num_tensors == 2
    receipt = out / "merge_receipt.json"
    told = json.loads(receipt.read_text())
    assert told["options"]["simulate_quant"] == "fp4"
    assert "The linear weights of the base were rounded through FP4 first" in (out / "README.md").read_text()
    told["options"]["quant_blocksize"] = 64
    receipt.write_text(json.dumps(told))
    with pytest.raises(VerifyError, match="proj"):
        distmerge.verify(out, base=dense, adapters=choices)


def test_what_rounding_cost_is_told_beside_the_values(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path, **LARGE)
    config = distmerge.MergeConfig(
        base=dense,
        adapters=(distmerge.AdapterChoice(folder=adapter),),
        output=tmp_path / "none",
        device="cpu",
        simulate_quant="nf4",
    )
    plan = distmerge.plan(config)
    base = packed(dense, tmp_path / "packed", quant_type="nf4", compress_statistics=True)
    plain, seen = load_folder(dense), oracles.dense(load_folder(base))
    reader = Reader(plan, dense, (adapter,), torch.device("cpu"))
    buffers = reader.buffers()
    for task in plan.tasks:
        lost = 0.0
        for number in range(task.num_blocks):
            values = reader.read_dense(buffers, task.source, *task.block(number), origin=task.origin)
            assert torch.equal(values, seen[task.name].view(-1)[slice(*task.block(number))])
            lost += buffers.lost_squared
        expected = float((plain[task.name].double() - seen[task.name].double()).square().sum())
        assert lost == pytest.approx(expected, rel=1e-3)
        assert (lost > 0) == isinstance(task.source.packing, Simulated)
    reader.close()


def test_scales_that_are_no_longer_kept_are_found_again(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path)
    base = packed(dense, tmp_path / "packed", quant_type="nf4", compress_statistics=True)
    seen = oracles.dense(load_folder(base))
    config = distmerge.MergeConfig(
        base=dense,
        adapters=(distmerge.AdapterChoice(folder=adapter),),
        output=tmp_path / "none",
        device="cpu",
        simulate_quant="nf4",
    )
    plan = distmerge.plan(config)
    reader = Reader(plan, dense, (adapter,), torch.device("cpu"))
    reader.dense = Dense(reader.read, torch.device("cpu"), kept_nbytes=0)
    for _ in range(2):
        for task in plan.tasks:
            values = reader.read_dense(reader.buffers(), task.source, 0, task.source.numel, origin=task.origin)
            assert torch.equal(values, seen[task.name].view(-1))
            known = [one.source.name for one in plan.tasks if reader.dense.knows(one.source.name)]
            assert len(known) <= 1
    reader.close()


def test_a_base_that_is_packed_already_is_refused(packed_base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is packed already"):
        merge(packed_base, adapter, tmp_path / "out", simulate_quant="nf4")


def test_a_base_without_linears_to_pack_is_refused(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path)
    with pytest.raises(InputError, match="no linear layer that bitsandbytes would pack"):
        merge(dense, adapter, tmp_path / "out", simulate_quant="nf4", quant_skip=("proj", "lm_head"))


def test_a_tied_head_that_would_be_packed_is_refused(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path, tie_word_embeddings=True)
    tensors = load_folder(dense)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight.*--quant-skip lets it be packed"):
        merge(dense, adapter, tmp_path / "out", simulate_quant="nf4", quant_skip=("k_proj",))
    merge(dense, adapter, tmp_path / "out", simulate_quant="nf4", quant_skip=("k_proj", "lm_head"))


def test_a_base_whose_class_is_not_known_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{LINEAR}.weight": torch.randn(8, 64)})
    adapter = write_adapter(tmp_path / "lora", {LINEAR: (torch.randn(2, 64), torch.randn(8, 2))})
    with pytest.raises(InputError, match="only its class tells"):
        merge(base, adapter, tmp_path / "out", simulate_quant="nf4")


def test_a_linear_with_values_that_are_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path)
    tensors = load_folder(dense)
    tensors[f"{LINEAR}.weight"][3, 5] = torch.inf
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyError, match=rf"{LINEAR}.*not finite"):
        merge(dense, adapter, tmp_path / "out", simulate_quant="nf4")


@pytest.mark.parametrize(
    ("option", "value"),
    [("simulate_quant", "int8"), ("quant_blocksize", 48), ("quant_compute_dtype", "half"), ("quant_skip", ("(",))],
)
def test_options_of_packing_that_mean_nothing_are_refused(option: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=option.replace("_", "-")):
        merge(tmp_path, tmp_path, tmp_path / "out", **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("quant_blocksize", 128),
        ("quant_double", False),
        ("quant_compute_dtype", "float16"),
        ("quant_skip", ("k_proj",)),
    ],
)
def test_options_of_packing_are_refused_where_nothing_goes_through_4_bits(
    option: str, value: Any, tmp_path: Path
) -> None:
    choices = (distmerge.AdapterChoice(folder=tmp_path),)
    files = {"base": tmp_path, "adapters": choices, "output": tmp_path / "out"}
    with pytest.raises(UsageError, match=rf"{option.replace('_', '-')} given, but nothing goes through 4 bits"):
        distmerge.MergeConfig(**files, **{option: value})
    for chosen in ({"simulate_quant": "nf4"}, {"quantize": "fp4"}):
        distmerge.MergeConfig(**files, **chosen, **{option: value})


@pytest.mark.parametrize("option", ["simulate_quant", "quantize"])
def test_a_name_to_skip_that_no_module_has_is_refused(option: str, tmp_path: Path) -> None:
    dense, adapter = small(tmp_path)
    for skip, hint in (("zzz", "the end of a module's name"), ("kproj", "did you mean 'k_proj'")):
        with pytest.raises(InputError, match=f"'{skip}' names no module of LlamaForCausalLM") as caught:
            merge(dense, adapter, tmp_path / "out", **{option: "nf4", "quant_skip": ("lm_head", skip)})
        assert hint in caught.value.hint
    for number, skip in enumerate(("embed_tokens", "model.layers.0.self_attn", r"model\.layers\.\d+\.mlp")):
        merge(dense, adapter, tmp_path / f"out-{number}", **{option: "nf4", "quant_skip": ("lm_head", skip)})


def test_a_plan_says_what_is_simulated_and_an_adapter_of_a_packed_base_asks_for_it(tmp_path: Path) -> None:
    dense, adapter = small(tmp_path)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="unsloth/llama-bnb-4bit")
    config = distmerge.MergeConfig(
        base=dense, adapters=(distmerge.AdapterChoice(folder=adapter),), output=tmp_path / "out", device="cpu"
    )
    plan = distmerge.plan(config)
    assert any("--simulate-quant nf4 merges into those that it has" in text for text in plan.warnings)
    plan = distmerge.plan(replace(config, simulate_quant="nf4"))
    assert not any("--simulate-quant" in text for text in plan.warnings)
    facts = plan_facts(plan, config, wanted_lanes=1, room_nbytes=0, nproc=1)
    assert facts["packed_tensors"] == 0
    assert "7 tensors go through NF4 in blocks of 64, with double quantization first" in plan_table(facts)
