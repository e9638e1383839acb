"""What adapters do to tensors: effects on a model's parameters, and changes to the tensors that hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from distmerge.adapter.views import View
from distmerge.numerics.compiled import PANEL

# Operators whose change is scaling * b @ a, with views that can be cut to any part of the matrix.
LORA = "lora"
ADD = "add"  # scaled values added to a vector: a trained bias
BLOCK_ROWS_NUMEL = 1 << 19  # elements of the rows that an operator gets at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one adapter does to one parameter, in the adapter's own names.

    `path` names the parameter as the adapter does. The operator works on `shape` (experts, out, in): one matrix, or one
    for each expert; `transposed` says that the parameter holds them as (in, out). `tensors` are what it works with, by
    role; of LoRA's, `a` is (experts, r, in) and `b` (experts, out, r), and they can be cut.
    """

    path: str
    operator: str
    tensors: dict[str, View]
    options: dict[str, Any]
    shape: tuple[int, int, int]
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A parameter that the adapter holds whole: its values take the place of the base's."""

    path: str
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a tensor that is seen as `matrices` of (rows, cols): [first, last) of each."""

    matrices: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]

    @property
    def numel(self) -> int:
        return math.prod(last - first for first, last in (self.matrices, self.rows, self.cols))


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What an operator computes from its tensors before the first block: `nbytes` while it does, `held_nbytes` of
    results."""

    nbytes: int
    held_nbytes: int


NOTHING = Computed(nbytes=0, held_nbytes=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one adapter does to one output tensor, seen as `shape` (matrices, rows, cols).

    `adapter` counts the adapters from 0. The operator's matrix (out, in) is the region, or with `transposed` its
    transpose. `whole` says that the operator needs all of the tensor at once, `computed` what it makes
    of its tensors first. `also` names tensors of the adapter that
    say the same once more, for a parameter that is tied to this one.
    """

    operator: str
    tensors: dict[str, View]
    options: dict[str, Any]
    shape: tuple[int, int, int]
    region: Region
    transposed: bool
    adapter: int = 0
    weight: float = 1.0
    whole: bool = False
    computed: Computed = NOTHING
    also: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapter's tensors that it uses up, by the names in the file."""
        return tuple(dict.fromkeys([*(view.spec.name for view in self.tensors.values()), *self.also]))

    @property
    def held_nbytes(self) -> int:
        """Bytes that its tensors take while blocks are worked on, the panels of a factor among them."""
        numel = sum(view.numel for view in self.tensors.values())
        return self.computed.held_nbytes + self._panels_nbytes + (8 if self.whole else 4) * numel

    @property
    def _panels_nbytes(self) -> int:
        if self.operator != LORA:
            return 0
        n, r, cols = self.tensors["a"].size
        if self.transposed:  # b may have its rows in several dimensions
            cols = self.tensors["b"].numel // max(n * r, 1)
        return 4 * n * r * -(-cols // PANEL) * PANEL

    @property
    def loading_nbytes(self) -> int:
        """Bytes that reading its tensors takes beside what is held: as stored, and for computing with them."""
        stored = sum(view.nbytes_read + 4 * view.numel for view in self.tensors.values())
        if self.operator != LORA:
            return stored + self.computed.nbytes
        # Norms and singular values are computed in float64, of one matrix after the other.
        wide = sum(8 * view.numel // max(view.size[0], 1) for view in self.tensors.values())
        return max(stored, wide) + 24 * self.r**2

    @property
    def r(self) -> int:
        """The inner dimension of its product of factors, 0 if only its operator knows whether it is one."""
        return self.tensors["a"].size[1] if self.operator == LORA else int(self.operator == ADD)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that its operator takes beside the block, in temporaries."""
        if self.operator in (LORA, ADD):
            return 0
        matrix = math.prod(self.shape) if self.whole else min(math.prod(self.shape), BLOCK_ROWS_NUMEL)
        return 8 * matrix * (12 if self.whole else 4)

    def numel_in(self, first: int, last: int) -> int:
        """How many elements of the region lie among the tensor's flat elements [first, last)."""
        _, rows, cols = self.shape
        count = 0
        for matrix in range(*self.region.matrices):
            top, bottom = (matrix * rows + row for row in self.region.rows)
            if bottom * cols <= first or top * cols >= last:
                continue
            count += _elements_below(last, top, bottom, cols, self.region.cols) - _elements_below(
                first, top, bottom, cols, self.region.cols
            )
        return count


def _elements_below(flat: int, top: int, bottom: int, cols: int, part: tuple[int, int]) -> int:
    """How many elements of rows [top, bottom) and columns `part` have a flat number below `flat`."""
    row, col = divmod(flat, cols)
    if row >= bottom:
        return (bottom - top) * (part[1] - part[0])
    if row < top:
        return 0
    return (row - top) * (part[1] - part[0]) + min(max(col - part[0], 0), part[1] - part[0])
