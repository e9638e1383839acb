"""4-bit codes to floats: the formula, element by element, and bitsandbytes' own bytes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st

from distmerge.numerics import nf4

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
FP4 = functional.get_4bit_type("fp4", device="cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_code_table_is_bitsandbytes_own() -> None:
    assert torch.equal(nf4.NF4, functional.get_4bit_type("nf4", device="cpu"))


def test_the_dynamic_map_is_bitsandbytes_own() -> None:
    assert torch.equal(nf4.dynamic_map(), functional.create_dynamic_map().float())


@pytest.mark.parametrize("table", [nf4.NF4, FP4], ids=["nf4", "fp4"])
def test_a_byte_holds_two_codes_the_first_in_its_high_nibble(table: torch.Tensor) -> None:
    packed, out = torch.arange(256, dtype=torch.uint8), torch.empty(512)
    nf4.unpack(packed, nf4.pair_table(table), torch.empty(256, dtype=torch.int32), out)
    assert out.tolist() == [table[code].item() for byte in range(256) for code in (byte >> 4, byte & 15)]


@given(
    st.sampled_from(BLOCKSIZES),
    st.integers(0, 20_000).flatmap(lambda n: st.sampled_from([n, n | 1, n // 64 * 64])),
    st.integers(1, 9000),
)
def test_each_element_is_scaled_by_its_own_block_wherever_the_range_begins(
    blocksize: int, first: int, numel: int
) -> None:
    begin, end = first // blocksize, (first + numel - 1) // blocksize + 1
    values, absmax = noise(numel), noise(end - begin, seed=1)
    expected = values * absmax[(first + torch.arange(numel)) // blocksize - begin]
    nf4.scale(values, absmax, first=first, blocksize=blocksize)
    assert torch.equal(values, expected)


@given(st.sampled_from([64, 256]), st.integers(0, 1000), st.integers(1, 900))
def test_nested_scales_are_code_times_scale_plus_offset(blocksize: int, first: int, count: int) -> None:
    codes = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    begin, end = first // blocksize, (first + count - 1) // blocksize + 1
    table, scales, offset = nf4.dynamic_map(), noise(end - begin).abs(), 0.0532
    found = nf4.nested_absmax(codes, table, scales, first=first, blocksize=blocksize, offset=offset)
    expected = [
        table[codes[i].item()] * scales[(first + i) // blocksize - begin] + torch.tensor(offset) for i in range(count)
    ]
    assert found.tolist() == [value.item() for value in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "blocksize"), [((96, 64), 64), ((40, 96), 32), ((64, 512), 4096), ((24, 256), 128)])
def test_packing_gives_the_codes_that_bitsandbytes_gives(
    dtype: torch.dtype, shape: tuple[int, int], blocksize: int
) -> None:
    weight = (noise(*shape) * 0.05).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    packed = nf4.pack(weight, nf4.NF4, blocksize=blocksize)
    assert torch.equal(packed.codes, codes)
    assert len(packed.absmax) == len(state.absmax)


@pytest.mark.parametrize("shape", [(96, 64), (200, 352)])
def test_packing_scales_as_bitsandbytes_double_quantization_does(shape: tuple[int, int]) -> None:
    weight = noise(*shape) * 0.05
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = nf4.pack(weight, nf4.NF4, blocksize=64)
    assert torch.equal(packed.absmax, state.absmax)
    assert torch.equal(packed.nested_absmax, state.state2.absmax)
    assert packed.nested_offset == pytest.approx(float(state.offset), rel=1e-6)


@pytest.mark.parametrize("blocksize", [32, 64, 512])
def test_what_was_packed_unpacks_to_within_half_the_widest_gap_between_codes(blocksize: int) -> None:
    weight = noise(48, 512) * 0.05
    packed, numel = nf4.pack(weight, nf4.NF4, blocksize=blocksize), weight.numel()
    values = torch.empty(numel)
    nf4.unpack(packed.codes.view(-1), nf4.pair_table(nf4.NF4), torch.empty(numel // 2, dtype=torch.int32), values)
    table, offset = packed.nested_quant_map, packed.nested_offset
    absmax = nf4.nested_absmax(packed.absmax, table, packed.nested_absmax, first=0, blocksize=256, offset=offset)
    nf4.scale(values, absmax, first=0, blocksize=blocksize)
    # Half the widest gap of NF4 is 0.152; 8 bits for the scales cost a few percent more.
    largest = weight.view(-1, blocksize).abs().amax(1, keepdim=True)
    assert ((values.view(-1, blocksize) - weight.view(-1, blocksize)).abs() <= 0.19 * largest).all()


def test_a_block_of_zeros_packs_to_the_code_of_zero() -> None:
    packed = nf4.pack(torch.zeros(2, 64), nf4.NF4, blocksize=64)
    assert packed.codes.unique().tolist() == [0x77]
