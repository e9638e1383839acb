"""Packed bases: what training saw, plus the deltas, whatever the packing's options."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests import oracles
from tests.conftest import digests
from tests.factories import (
    headers,
    hub_snapshot,
    load_folder,
    merge,
    packed_tensors,
    repack_base,
    save_adapter,
    save_base,
    save_packed_base,
    split_files,
    write_adapter,
    write_base,
)

LINEAR = "model.layers.0.mlp.down_proj"
STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
OPTIONS = list(itertools.product(["nf4", "fp4"], [True, False], STORAGE))


@pytest.fixture(scope="session")
def dense_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama before it is packed. Its intermediate size is no multiple of 64."""
    return save_base(tmp_path_factory.mktemp("dense") / "llama", intermediate_size=168)


@pytest.fixture(scope="session")
def fitting_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.factories import build_llama

    model = build_llama(torch.float32, intermediate_size=168)
    return save_adapter(tmp_path_factory.mktemp("adapter") / "fitting", r=5, alpha=3, model=model)


def noise(*shape: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_merged(out: Path, base: Path, adapter: Path, dtype: torch.dtype | None = None) -> None:
    oracles.assert_merged(out, oracles.dense(load_folder(base)), [(adapter, 1.0)], dtype)


def test_packed_weights_become_what_training_saw_plus_the_delta(
    packed_base: Path, merged_nf4: Path, adapter: Path
) -> None:
    assert_merged(merged_nf4, packed_base, adapter)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_packing_that_bitsandbytes_writes_is_read(
    options: tuple[str, bool, torch.dtype], dense_base: Path, fitting_adapter: Path, tmp_path: Path
) -> None:
    kind, double, storage = options
    named = {"quant_type": kind, "compress_statistics": double, "quant_storage": storage}
    base = repack_base(dense_base, tmp_path / "base", **named)
    assert load_folder(base)[f"{LINEAR}.weight"].dtype == storage
    assert_merged(merge(base, fitting_adapter, tmp_path / "out"), base, fitting_adapter)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_every_block_size_is_read_also_where_blocks_cross_rows(
    blocksize: int, double: bool, dense_base: Path, fitting_adapter: Path, tmp_path: Path
) -> None:
    base = repack_base(dense_base, tmp_path / "base", blocksize=blocksize, compress_statistics=double)
    assert_merged(merge(base, fitting_adapter, tmp_path / "out"), base, fitting_adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_output_has_the_dtype_that_the_packing_recorded(dtype: torch.dtype, adapter: Path, tmp_path: Path) -> None:
    base = repack_base(save_base(tmp_path / "dense", dtype), tmp_path / "base", compress_statistics=True)
    out = merge(base, adapter, tmp_path / "out")
    assert_merged(out, base, adapter)
    assert load_folder(out)[f"{LINEAR}.weight"].dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_rounds_once_more_only_where_it_differs_from_the_recorded_one(
    dtype: str, packed_base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = merge(packed_base, adapter, tmp_path / "out", dtype=dtype)
    assert_merged(out, packed_base, adapter, getattr(torch, dtype))


@pytest.mark.parametrize(
    ("shape", "blocksize", "double"),
    [((1100, 1001), 64, True), ((700, 1501), 4096, False), ((3, 600_001), 128, True), ((1031, 1024), 64, False)],
    ids=str,
)
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "dequantized"])
def test_a_packed_tensor_of_several_blocks_is_right_also_from_odd_elements_on(
    shape: tuple[int, int], blocksize: int, double: bool, merged: bool, tmp_path: Path
) -> None:
    options = {"blocksize": blocksize, "quant_type": "nf4", "compress_statistics": double}
    tensors = packed_tensors(f"{LINEAR}.weight", noise(*shape).bfloat16(), **options)
    base = write_base(tmp_path / "base", {**tensors, "other.weight": noise(8, 6)})
    on = {LINEAR: (noise(2, shape[1]), noise(shape[0], 2))} if merged else {"other": (noise(2, 6), noise(8, 2))}
    adapter = write_adapter(tmp_path / "lora", on)
    assert_merged(merge(base, adapter, tmp_path / "out"), base, adapter)


def test_a_tensor_of_an_odd_number_of_elements_is_read(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", packed_tensors(f"{LINEAR}.weight", noise(33, 21), quant_type="nf4"))
    adapter = write_adapter(tmp_path / "lora", {LINEAR: (noise(2, 21), noise(33, 2))})
    assert_merged(merge(base, adapter, tmp_path / "out"), base, adapter)


@pytest.mark.parametrize("shape", [(96, 128), (2100, 512)])
def test_scales_that_were_written_transposed_are_read(shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = packed_tensors(f"{LINEAR}.weight", noise(*shape).bfloat16(), quant_type="nf4")
    absmax = tensors[f"{LINEAR}.weight.absmax"].view(shape[0], shape[1] // 64)
    tensors[f"{LINEAR}.weight.absmax"] = absmax.T.bfloat16().contiguous()  # as after a forward pass on the CPU
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "lora", {LINEAR: (noise(3, shape[1]), noise(shape[0], 3))})
    out = merge(base, adapter, tmp_path / "out")
    assert_merged(out, base, adapter)
    lost = (load_folder(out)[f"{LINEAR}.weight"] - noise(*shape)).abs().amax()
    assert lost < 0.1, "scales of other blocks would be far off"


def test_companions_may_lie_in_another_file_than_their_weight(packed_base: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tensors = load_folder(packed_base)
    write_base(base, tensors)
    tails = (".absmax", ".quant_map", "nested_absmax", "nested_quant_map", "__nf4")
    number = {name: next((i for i, tail in enumerate(tails) if name.endswith(tail)), 5) for name in tensors}
    split_files(base, {name: f"model-{number[name]}.safetensors" for name in tensors})
    out = merge(base, adapter, tmp_path / "out")
    assert_merged(out, base, adapter)
    assert list(headers(out)) == ["model.safetensors"]


def test_modules_that_were_skipped_stay_plain_and_are_merged_as_such(
    dense_base: Path, fitting_adapter: Path, tmp_path: Path
) -> None:
    skipped = ("lm_head", "model.layers.0.mlp.down_proj", "q_proj")
    base = repack_base(dense_base, tmp_path / "base", keep=skipped, compress_statistics=True)
    assert f"{LINEAR}.weight.absmax" not in load_folder(base)
    assert_merged(merge(base, fitting_adapter, tmp_path / "out"), base, fitting_adapter)


def test_a_head_that_was_packed_is_dequantized(dense_base: Path, fitting_adapter: Path, tmp_path: Path) -> None:
    base = repack_base(dense_base, tmp_path / "base", keep=("q_proj",))
    assert "lm_head.weight.absmax" in load_folder(base)
    assert_merged(merge(base, fitting_adapter, tmp_path / "out"), base, fitting_adapter)


def test_biases_beside_packed_weights_are_untouched(fp32_base: Path, adapter: Path, tmp_path: Path) -> None:
    base = repack_base(fp32_base, tmp_path / "base", compress_statistics=True)
    out = merge(base, adapter, tmp_path / "out")
    assert_merged(out, base, adapter)
    assert "model.layers.0.self_attn.q_proj.bias" in load_folder(out)


@pytest.mark.parametrize(("kind", "double"), [("fp4", True), ("nf4", False)])
def test_a_base_that_transformers_packed_for_fsdp_is_read(
    kind: str, double: bool, adapter: Path, tmp_path: Path
) -> None:
    base = save_packed_base(tmp_path / "b", quant_type=kind, double=double, storage=torch.bfloat16, shard="30KB")
    assert_merged(merge(base, adapter, tmp_path / "out"), base, adapter)


def test_a_packed_snapshot_of_symlinks_merges_as_the_files_do(
    packed_base: Path, adapter: Path, merged_nf4: Path, tmp_path: Path
) -> None:
    out = merge(hub_snapshot(packed_base, tmp_path / "cache"), adapter, tmp_path / "out")
    assert digests(out) == digests(merged_nf4)


def test_nothing_of_the_packing_is_left(merged_nf4: Path) -> None:
    names = [name for names in headers(merged_nf4).values() for name in names]
    assert not [name for name in names if "absmax" in name or "quant" in name]
    assert "quantization_config" not in json.loads((merged_nf4 / "config.json").read_text())


def test_a_code_table_of_its_own_is_used(tmp_path: Path) -> None:
    """The checkpoint's table counts, not one that distmerge knows."""
    tensors = packed_tensors(f"{LINEAR}.weight", noise(16, 64).bfloat16(), quant_type="nf4")
    tensors[f"{LINEAR}.weight.quant_map"] = torch.linspace(-1, 1, 16)
    second = {f"{LINEAR.replace('0', '1')}{name.removeprefix(LINEAR)}": t.clone() for name, t in tensors.items()}
    second[f"{LINEAR.replace('0', '1')}.weight.quant_map"] = torch.linspace(-2, 1, 16)
    base = write_base(tmp_path / "base", tensors | second)
    adapter = write_adapter(tmp_path / "lora", {LINEAR: (noise(2, 64), noise(16, 2))})
    assert_merged(merge(base, adapter, tmp_path / "out"), base, adapter)
