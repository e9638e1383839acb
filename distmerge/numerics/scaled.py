"""Numbers of one byte or of 4 bits, scaled by blocks of a matrix, as floats: one product in float32 per element.

A block of (rows, cols) has one scale; the last blocks of a matrix need not be full (DeepSeek-V3's FP8 with blocks of
128 x 128, one scale for a row or a tensor, compressed-tensors' groups, OCP's microscaling formats with 1 x 32).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# OCP microscaling formats, 5.3.3: 1 sign bit, 2 bits of exponent, 1 of mantissa.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_EXPONENT_BIAS = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows [top, bottom) and columns [left, right) of matrices under one another: a part of a range of elements."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def numel(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def spans(first: int, last: int, cols: int) -> Iterator[Span]:
    """The flat elements [first, last) of rows of `cols` as rectangles in their order: at most the end of a row, whole
    rows, and the beginning of a row."""
    while first < last:
        row, left = divmod(first, cols)
        if left or last - first < cols:
            span = Span(top=row, bottom=row + 1, left=left, right=min(cols, left + last - first))
        else:
            span = Span(top=row, bottom=row + (last - first) // cols, left=0, right=cols)
        yield span
        first += span.numel


def low_first(quant_map: Tensor) -> Tensor:
    """For each byte value its two floats, low nibble first, as one int64: shape (256,), on `quant_map`'s device.
    `quant_map` is float32 (16,)."""
    byte = torch.arange(256, device=quant_map.device)
    return torch.stack([quant_map[byte & 15], quant_map[byte >> 4]], dim=1).contiguous().view(torch.int64).view(256)


def float8_pairs(dtype: torch.dtype) -> Tensor:
    """For each two bytes, the first one low, the two floats that they are in the 8-bit `dtype`, as one int64: shape
    (65536,). A gather of pairs is several times as fast as torch's own conversion on a CPU."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    code = torch.arange(1 << 16)
    return torch.stack([values[code & 255], values[code >> 8]], dim=1).view(torch.int64).view(-1)


def as_scales(stored: Tensor) -> Tensor:
    """Scales as float32; uint8 `b` stands for 2**(b - 127)."""
    if stored.dtype != torch.uint8:
        return stored.float()
    # 2**128, of the byte that OCP gives to NaN, is infinite in float32.
    powers = torch.tensor([2.0 ** (byte - _EXPONENT_BIAS) for byte in range(256)], dtype=torch.float64)
    return powers.float().to(stored.device)[stored.long()]


def grid_row(row: int, height: int, block: int) -> int:
    """The row of the grid of blocks that holds `row` of matrices of `height` rows under one another, whose blocks are
    `block` rows high and begin anew with each matrix."""
    return row // height * -(-height // block) + row % height // block


def blocks(
    values: Tensor, grid: Tensor, span: Span, *, height: int, block: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of `values` (rows, cols), the rectangle `span` of matrices of `height` rows, each with its entries of
    `grid`, to be broadcast. `grid` (grid rows, grid cols) begins with the grid row of the span's first row."""
    begin = grid_row(span.top, height, block[0])
    row = span.top
    while row < span.bottom:
        if block[0] == 1:
            end = span.bottom  # a grid row for every row, also beyond the end of a matrix
        else:
            end = min(span.bottom, row // height * height + min((row % height // block[0] + 1) * block[0], height))
        number = grid_row(row, height, block[0]) - begin
        entries = grid[number : number + (end - row if block[0] == 1 else 1)]
        yield from _columns(values[row - span.top : end - span.top], entries, left=span.left, width=block[1])
        row = end


def _columns(values: Tensor, entries: Tensor, *, left: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`values` (rows, cols), whose first column is number `left`, cut into blocks of `width` columns."""
    cols = values.shape[1]
    head = min(-left % width, cols)
    whole, first = (cols - head) // width, left // width
    if head:
        yield values[:, :head], entries[:, first, None]
        first += 1
    if whole:
        middle = values[:, head : head + whole * width]
        yield middle.view(len(values), whole, width), entries[:, first : first + whole, None]
    if head + whole * width < cols:
        yield values[:, head + whole * width :], entries[:, first + whole, None]
