"""Floats to 4-bit codes: bitsandbytes' own bytes, whatever the shape, and in whatever ranges they are asked for."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distmerge.numerics import nf4, packing4

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
KINDS = ["nf4", "fp4"]
NUMELS = [1, 2, 63, 64, 65, 4096, 5000, 66_177]


def weight(numel: int, dtype: torch.dtype, scale: float = 0.05) -> Tensor:
    """Noise with a stretch of zeros where there is room for one."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * scale
    values[300:700] = 0
    return values.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_packing_gives_the_bytes_that_bitsandbytes_gives(kind: str, dtype: torch.dtype, blocksize: int) -> None:
    for numel in NUMELS:
        for scale in (0.05, 1.0, 1e-39, 0.0):
            values = weight(numel, dtype, scale)
            theirs, state = functional.quantize_4bit(values, blocksize=blocksize, quant_type=kind)
            data, absmax = packing4.pack(values, nf4.TABLES[kind], blocksize=blocksize)
            assert torch.equal(data[:, None], theirs), (numel, scale)
            assert torch.equal(absmax, state.absmax), (numel, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_lie_between_two_codes_get_the_code_that_bitsandbytes_gives(kind: str) -> None:
    table = nf4.TABLES[kind].sort().values
    bits = ((table[:-1] + table[1:]) / 2).view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)
    between = bits.view(torch.float32).nan_to_num_(0.0).reshape(-1, 5)
    for scale in (1.0, 0.7, 3e-3):
        for length in (16, 15):  # the last block is short: it is divided, and not multiplied
            values = torch.nn.functional.pad(between, (1, 10), value=1.0).reshape(-1)[: -16 + length] * scale
            theirs, _ = functional.quantize_4bit(values, blocksize=32, quant_type=kind)
            assert torch.equal(packing4.pack(values, nf4.TABLES[kind], blocksize=32)[0], theirs[:, 0])


@pytest.mark.parametrize("numel", [64, 1000, 64 * 256, 64 * 256 + 1, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_are_nested_as_bitsandbytes_nests_them(numel: int, dtype: torch.dtype) -> None:
    for scale in (0.05, 7.0, 0.0):
        values = weight(numel, dtype, scale)
        _, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
        nested = packing4.nest(packing4.block_absmax(values, 64))
        assert torch.equal(nested.codes, state.absmax)
        assert torch.equal(nested.absmax, state.state2.absmax)
        assert nested.offset == float(state.offset)
        theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(packing4.unnest(nested), theirs)


def test_eight_bit_codes_change_where_those_of_bitsandbytes_change() -> None:
    steps = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65535 * 2 - 1
    values = torch.nn.functional.pad(steps.float().clamp(-1, 1).view(-1, 128), (1, 0), value=1.0)
    values = torch.nn.functional.pad(values, (0, 127)).reshape(-1).contiguous()
    # Every value between two steps, and its neighbours.
    for ulps in (-1, 0, 1):
        moved = (values.view(torch.int32) + ulps * (values.abs() > 1e-3) * (values != 1)).int().view(torch.float32)
        # A mean of 0 leaves the values as they are.
        balanced = torch.cat([moved, -moved])
        theirs, _ = functional.quantize_blockwise(balanced, blocksize=256)
        nested = packing4.nest(balanced)
        assert nested.offset == 0
        assert torch.equal(nested.codes, theirs)


def test_the_dynamic_map_is_bitsandbytes_own() -> None:
    assert torch.equal(packing4.dynamic_map(), functional.create_dynamic_map().float())


@pytest.mark.parametrize("numel", [1, 1000, 32_768, 32_769, 262_144, 1_000_001])
def test_the_mean_of_the_scales_is_that_of_one_thread_whatever_their_number(numel: int) -> None:
    before, theirs = torch.get_num_threads(), set()
    try:
        for seed in range(12):
            values = torch.rand(numel, generator=torch.Generator().manual_seed(seed))
            torch.set_num_threads(1)
            expected = values.mean()
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(packing4.mean(values), expected)
                theirs.add(torch.equal(values.mean(), expected))
    finally:
        torch.set_num_threads(before)
    assert (False in theirs) == (numel > 32_768), "torch's own mean no longer depends on threads: is this still needed?"


@given(st.sampled_from(KINDS), st.sampled_from(BLOCKSIZES), st.integers(1, 9000), st.data())
def test_a_range_gets_the_codes_that_the_whole_tensor_has_there(
    kind: str, blocksize: int, numel: int, data: st.DataObject
) -> None:
    values, table = weight(numel, torch.bfloat16), nf4.TABLES[kind]
    absmax = packing4.block_absmax(values, blocksize)
    whole = packing4.codes(values, absmax, table, first=0, blocksize=blocksize, numel=numel)
    first = data.draw(st.integers(0, numel - 1))
    last = data.draw(st.integers(first + 1, numel))
    blocks = absmax[first // blocksize : (last - 1) // blocksize + 1]
    part = packing4.codes(values[first:last], blocks, table, first=first, blocksize=blocksize, numel=numel)
    assert torch.equal(part, whole[first:last])


def test_an_empty_tensor_packs_to_nothing() -> None:
    data, absmax = packing4.pack(torch.empty(0, dtype=torch.bfloat16), nf4.NF4, blocksize=64)
    nested = packing4.nest(absmax)
    assert (len(data), len(absmax), len(nested.codes), len(nested.absmax), nested.offset) == (0, 0, 0, 0, 0.0)


def test_the_values_that_were_packed_are_not_changed() -> None:
    values = weight(1000, torch.float32)
    before = values.clone()
    packing4.pack(values, nf4.NF4, blocksize=64)
    assert torch.equal(values, before)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.sampled_from([0.0, -0.03, 0.001, 0.02, 0.07]), min_size=1, max_size=40), st.integers(0, 200))
def test_codes_for_other_scales_are_the_nearest_that_these_scales_have(
    kind: str, scales: list[float], first: int
) -> None:
    absmax, blocksize = torch.tensor(scales), 32
    numel = (len(scales) - 1) * blocksize + 1
    values, table = weight(numel, torch.float32), nf4.TABLES[kind]
    begin = first % blocksize
    values = values[: numel - begin]
    found = packing4.codes_for(values, absmax, table, first=first, blocksize=blocksize)
    own = absmax[(begin + torch.arange(len(values))) // blocksize].double()
    error = (table.double()[found.long()] * own - values.double()).abs()
    best = (table.double() * own[:, None] - values.double()[:, None]).abs().amin(1)
    assert bool((error <= best * (1 + 1e-6)).all())
