"""How a tensor is cut into blocks, the unit of reading, arithmetic and writing. Integers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

# A constant, not a share of the memory budget: the same matrix products in the same shapes give the same bits, whatever
# the budget and the number of ranks.
BLOCK_NUMEL = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The blocks of `numel` elements in rows of `row_numel`: all of them in one (`whole`), parts of single rows
    (`cuts_rows`), or `step` elements, which are whole rows."""

    numel: int
    row_numel: int
    step: int
    cuts_rows: bool
    whole: bool
    num_blocks: int

    @property
    def largest_numel(self) -> int:
        """Elements that a block holds at most; never less than an ordinary block."""
        if self.whole:
            return max(BLOCK_NUMEL, self.numel)
        return BLOCK_NUMEL if self.cuts_rows else max(BLOCK_NUMEL, self.step)

    def span(self, number: int) -> tuple[int, int]:
        """The flat elements [first, last) of block `number`."""
        if self.whole:
            return 0, self.numel
        if self.cuts_rows:
            row, part = divmod(number, math.ceil(self.row_numel / BLOCK_NUMEL))
            first = row * self.row_numel + part * BLOCK_NUMEL
            return first, min(first + BLOCK_NUMEL, (row + 1) * self.row_numel)
        return number * self.step, min((number + 1) * self.step, self.numel)


@lru_cache(maxsize=4096)
def grid_of(numel: int, row_numel: int, *, matrix_numel: int, whole: bool, blocksize: int | None) -> Grid:
    """The grid of a tensor of `numel` elements in rows of `row_numel`, which can only be read by `matrix_numel`.

    With `blocksize` it is packed, with a scale for so many elements: scales do not cross from one block to the next,
    and rows are cut only where they are the tensor. One grid serves all tensors of a shape: models have few shapes.
    """
    is_row = row_numel >= numel
    cuts_rows = row_numel > BLOCK_NUMEL and matrix_numel == 1 and (blocksize is None or is_row)
    rows = max(1, BLOCK_NUMEL // max(row_numel, 1))
    if matrix_numel > 1:
        step = matrix_numel
    elif blocksize is None or is_row:
        step = rows * row_numel
    else:
        unit = math.lcm(blocksize, row_numel) // row_numel
        step = min(max(rows // unit, 1) * unit * row_numel, numel)
    if numel == 0:
        count = 0
    elif whole:
        count = 1
    else:
        count = numel // row_numel * math.ceil(row_numel / BLOCK_NUMEL) if cuts_rows else math.ceil(numel / step)
    return Grid(numel=numel, row_numel=row_numel, step=step, cuts_rows=cuts_rows, whole=whole, num_blocks=count)
