"""Scales of blocks on any part of a stack of matrices, against one scale spread over each element."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distmerge.numerics import nf4, scaled
from tests.formats import FP4, spread

SIZES = st.integers(1, 9)


@given(st.tuples(SIZES, SIZES, SIZES), st.tuples(SIZES, SIZES), st.data())
def test_every_element_meets_the_scale_of_its_own_block_wherever_a_range_begins_and_ends(
    shape: tuple[int, int, int], block: tuple[int, int], data: st.DataObject
) -> None:
    (matrices, height, cols), (down, right) = shape, block
    numel = matrices * height * cols
    first = data.draw(st.integers(0, numel - 1))
    last = data.draw(st.integers(first + 1, numel))
    grid = torch.arange(matrices * -(-height // down) * -(-cols // right), dtype=torch.float32) + 1
    grid = grid.view(matrices, -(-height // down), -(-cols // right))
    expected = spread(grid, (down, right), (matrices, height, cols)).reshape(-1)[first:last]
    values = torch.ones(last - first)
    seen = 0
    for span in scaled.spans(first, last, cols):
        part = values[seen : seen + span.numel].view(span.bottom - span.top, -1)
        rows = grid.flatten(0, 1)[scaled.grid_row(span.top, height, down) :]
        for piece, entries in scaled.blocks(part, rows, span, height=height, block=(down, right)):
            piece.mul_(entries)
        seen += span.numel
    assert seen == last - first
    assert torch.equal(values, expected)


@given(st.integers(0, 10**12), st.integers(1, 10**9), st.integers(1, 10**7))
def test_a_range_is_at_most_three_rectangles_in_order(first: int, length: int, cols: int) -> None:
    found = list(scaled.spans(first, first + length, cols))
    assert len(found) <= 3
    at = first
    for span in found:
        assert (span.top, span.left) == divmod(at, cols)
        assert 0 <= span.left < span.right <= cols
        assert span.bottom - span.top == 1 or (span.left, span.right) == (0, cols)
        at += span.numel
    assert at == first + length


def test_bytes_of_scales_are_powers_of_two_also_where_float32_is_subnormal() -> None:
    found = scaled.as_scales(torch.arange(256, dtype=torch.uint8))
    assert [float(value) for value in found[:-1]] == [2.0 ** (byte - 127) for byte in range(255)]
    assert found[-1] == float("inf")
    e8m0 = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert torch.equal(scaled.as_scales(e8m0), found[:-1])


def gathered(codes: Tensor, table: Tensor) -> Tensor:
    out = torch.empty(2 * codes.numel())
    nf4.unpack(codes, table, torch.empty(codes.numel(), dtype=torch.int32), out)
    return out


def test_4_bit_floats_come_low_nibble_first() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.stack([FP4[codes.long() & 15], FP4[codes.long() >> 4]], 1).flatten()
    found = gathered(codes, scaled.low_first(scaled.E2M1))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), "also the sign of zero"


def test_pairs_of_8_bit_floats_are_what_torch_makes_of_each() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
        expected = codes.view(torch.uint8).view(dtype).float()
        found = gathered(codes, scaled.float8_pairs(dtype))
        assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert torch.equal(found.isnan(), expected.isnan())
