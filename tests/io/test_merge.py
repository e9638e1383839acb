"""A merge in this process, against float64 arithmetic: plain bases."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.errors import VerifyError
from distmerge.grid import BLOCK_NUMEL
from tests import oracles
from tests.conftest import digests, tree
from tests.factories import headers, hub_snapshot, load_folder, merge, save_base, split_files, write_adapter, write_base

LINEAR = "model.layers.0.mlp.up_proj"
NOISE = torch.Generator()


def noise(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=NOISE.manual_seed(seed)) * scale


def test_merged_elements_are_rounded_once_and_all_others_are_untouched(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    distmerge.merge(MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=out))
    merged, exact = load_folder(out), oracles.merged(load_folder(base), [(adapter, 1.0)])
    changed = oracles.deltas(adapter)
    assert merged.keys() == exact.keys()
    for name, tensor in load_folder(base).items():
        if name in changed:
            oracles.assert_rounded_once(merged[name], *exact[name], terms=8, name=name)
        else:
            assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["50GB", "30KB"])
def test_a_merge_is_right_in_every_dtype_in_one_file_and_in_several(
    dtype: torch.dtype, shard: str, adapter: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", dtype, shard=shard)
    out = merge(base, adapter, tmp_path / "out")
    oracles.assert_merged(out, load_folder(base), [(adapter, 1.0)])
    assert headers(out) == headers(base)


def test_each_tensor_of_a_base_of_mixed_dtypes_keeps_its_own(adapter: Path, fp32_base: Path, tmp_path: Path) -> None:
    tensors = load_file(fp32_base / "model.safetensors")
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    tensors = {name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(sorted(tensors.items()))}
    extra = {
        "steps": torch.arange(7),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "codes": torch.arange(5, dtype=torch.uint8),
    }
    base = write_base(tmp_path / "base", tensors | extra)
    out = merge(base, adapter, tmp_path / "out")
    oracles.assert_merged(out, load_folder(base), [(adapter, 1.0)])


def test_a_plain_base_keeps_the_names_and_boundaries_of_its_files(base: Path, merged: Path) -> None:
    assert len(headers(base)) > 2
    assert headers(merged) == headers(base)


def test_a_snapshot_of_symlinks_merges_as_the_files_do(base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    out = merge(hub_snapshot(base, tmp_path / "cache"), adapter, tmp_path / "out")
    assert digests(out) == digests(merged)
    assert not any(path.is_symlink() for path in out.iterdir())


def test_inputs_are_never_written_to(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = tree(base), tree(adapter)
    times = {path: path.stat().st_mtime_ns for folder in (base, adapter) for path in folder.rglob("*")}
    merge(base, adapter, tmp_path / "out", overwrite=True)
    assert (tree(base), tree(adapter)) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_whole_small_output_file_is_these_bytes(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.tensor([[1.0, 2.0]]).bfloat16(), "n.bias": torch.tensor([0.5])}
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "lora", {"m": (torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25]]))}, alpha=2)
    out = merge(base, adapter, tmp_path / "out")
    header = (
        b'{"__metadata__":{"format":"pt"},"n.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"m.weight":{"dtype":"BF16","shape":[1,2],"data_offsets":[4,8]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    data = b"\x00\x00\x00\x3f" + b"\xc0\x3f" + b"\x40\x40"  # 0.5, then 1.5 and 3.0
    assert (out / "model.safetensors").read_bytes() == len(padded).to_bytes(8, "little") + padded + data


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, BLOCK_NUMEL + 77), torch.bfloat16),
        ((2 * (BLOCK_NUMEL // 500) + 3, 500), torch.float32),
        ((BLOCK_NUMEL + 9, 1), torch.float16),
        ((2, BLOCK_NUMEL), torch.bfloat16),
    ],
    ids=str,
)
def test_a_tensor_of_several_blocks_is_merged_whole(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    weight = noise(*shape).to(dtype)
    base = write_base(tmp_path / "base", {f"{LINEAR}.weight": weight, "other": noise(BLOCK_NUMEL * 2 + 5)})
    pair = noise(3, shape[1], seed=1, scale=0.1), noise(shape[0], 3, seed=2, scale=0.1)
    adapter = write_adapter(tmp_path / "lora", {LINEAR: pair})
    out = merge(base, adapter, tmp_path / "out")
    oracles.assert_merged(out, load_folder(base), [(adapter, 1.0)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_dtype_converts_every_float_and_rounds_merged_ones_once(
    source: torch.dtype, dtype: str, adapter: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", source, shard="60KB")
    split_files(base, {**{name: f"model-{i % 2}.safetensors" for i, name in enumerate(load_folder(base))}})
    out = merge(base, adapter, tmp_path / "out", dtype=dtype)
    oracles.assert_merged(out, load_folder(base), [(adapter, 1.0)], getattr(torch, dtype))


def test_dtype_leaves_what_is_no_float_alone(tmp_path: Path) -> None:
    tensors = {f"{LINEAR}.weight": noise(6, 4), "ids": torch.arange(9), "flags": torch.tensor([True, False])}
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "lora", {LINEAR: (noise(2, 4), noise(6, 2))})
    out = load_folder(merge(base, adapter, tmp_path / "out", dtype="float16"))
    assert {name: out[name].dtype for name in ("ids", "flags")} == {"ids": torch.int64, "flags": torch.bool}
    assert torch.equal(out["ids"], tensors["ids"])


@pytest.mark.parametrize("name", [f"{LINEAR}.weight", "untouched.weight"])
def test_a_value_that_does_not_fit_the_dtype_stops_the_merge_and_names_the_tensor(name: str, tmp_path: Path) -> None:
    tensors = {f"{LINEAR}.weight": noise(6, 4), "untouched.weight": noise(3, 3)}
    tensors[name][0, 0] = 1e5
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "lora", {LINEAR: (noise(2, 4), noise(6, 2))})
    with pytest.raises(VerifyError, match="does not fit F16") as error:
        merge(base, adapter, tmp_path / "out", dtype="float16")
    assert error.value.where == name
    assert not (tmp_path / "out").exists()


def test_two_memory_budgets_give_equal_bytes(base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    out = merge(base, adapter, tmp_path / "out", memory_budget=16 << 20)
    assert tree(out) == tree(merged)


def test_a_second_merge_finds_its_result_and_changes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = merge(base, adapter, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    merge(base, adapter, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_overwrite_replaces_the_result_of_another_merge(
    base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    out = merge(base, other_adapter, tmp_path / "out")
    with pytest.raises(distmerge.DistmergeError, match="another merge"):
        merge(base, adapter, out)
    merge(base, adapter, out, overwrite=True)
    oracles.assert_merged(out, load_folder(base), [(adapter, 1.0)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_merged_output_can_be_the_base_of_the_next_merge(
    base: Path, adapter: Path, merged: Path, other_adapter: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(merged, tmp_path / "base"))
    oracles.assert_merged(merge(copied, other_adapter, tmp_path / "out"), load_folder(copied), [(other_adapter, 1.0)])
    with pytest.raises(distmerge.DistmergeError, match="is merged into this base already"):
        merge(copied, adapter, tmp_path / "again")


def test_a_program_gets_its_own_settings_of_torch_back(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype()
    expected = digests(merge(base, adapter, tmp_path / "plain"))
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        out = merge(base, adapter, tmp_path / "out")
        distmerge.verify(out, base=base, adapters=(distmerge.AdapterChoice(folder=adapter),))
        assert torch.get_num_threads() == 2
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_default_dtype() == torch.float64
        assert digests(out) == expected
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.set_default_dtype(before[2])
