"""4-bit codes to floats: the formula, element by element, and bitsandbytes' own tables."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st

from distmerge.numerics import nf4
from distmerge.numerics.packing4 import dynamic_map

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_code_table_is_bitsandbytes_own(kind: str) -> None:
    own, theirs = nf4.TABLES[kind], functional.get_4bit_type(kind, device="cpu")
    assert torch.equal(own.view(torch.int32), theirs.view(torch.int32))  # since 0 equals -0


@pytest.mark.parametrize("table", [nf4.NF4, nf4.FP4], ids=["nf4", "fp4"])
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
    table, scales, offset = dynamic_map(), noise(end - begin).abs(), 0.0532
    found = nf4.nested_absmax(codes, table, scales, first=first, blocksize=blocksize, offset=offset)
    expected = [
        table[codes[i].item()] * scales[(first + i) // blocksize - begin] + torch.tensor(offset) for i in range(count)
    ]
    assert found.tolist() == [value.item() for value in expected]
