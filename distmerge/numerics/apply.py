"""Changes applied to blocks of a tensor: each to the part of the block that lies in its region, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmerge.numerics.compiled import Product
from distmerge.numerics.lora import Factors, add_delta

Operator = Callable[[Tensor, Tensor, Mapping[str, Tensor], Mapping[str, Any], slice], Tensor]


def in_float64(operator: Operator) -> Operator:
    """`operator` computed in float64, on tensors that are float64 already; its result has the dtype of the weight."""

    def compute(
        weight: Tensor, base: Tensor, tensors: Mapping[str, Tensor], options: Mapping[str, Any], rows: slice
    ) -> Tensor:
        return operator(weight.double(), base.double(), tensors, options, rows).to(weight.dtype)

    return compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A change with its tensors in memory, for a tensor seen as matrices of `height` rows.

    It concerns [first, last) of `matrices`, `rows` and `cols`. Either `factors` are added, or `operator` (weight,
    base, tensors, options, rows) gives new rows, of which `weight` of the way is gone; `transposed` says that the
    operator's matrix is the region's transpose (factors are transposed already).
    """

    height: int
    matrices: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]
    factors: Factors | None = None
    operator: Operator | None = None
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    weight: float
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What a change did to a block: how many elements it concerned, and the sum of its squares, which is 0 for
    factors, whose norm is known without it."""

    numel: int
    squared: float


def as_rows(block: Tensor, first: int, row_numel: int) -> tuple[Tensor, int, int]:
    """The flat `block` as (rows, cols) of a tensor with rows of `row_numel`, and the row and the column that its first
    element, number `first` of the tensor, is in."""
    return block.view(max(1, len(block) // row_numel), min(len(block), row_numel)), *divmod(first, row_numel)


def apply_changes(work: Tensor, changes: tuple[Loaded, ...], *, top: int, left: int) -> tuple[Applied, ...]:
    """Applies `changes` to `work` (rows, cols) in place, one after another.

    `work` holds the base's values of the block whose first element is in row `top` (counted through all matrices) and
    column `left`. Operators see the unmerged base beside the running values.
    """
    base = work.clone() if len(changes) > 1 and any(change.operator for change in changes) else work
    return tuple(_apply(work, base, change, top=top, left=left) for change in changes)


def only_product(
    changes: Sequence[Loaded], shape: tuple[int, int], *, top: int, left: int
) -> tuple[Product, tuple[Applied, ...]] | None:
    """The one product that is all that `changes` add to a block of `shape` (rows, cols), whole, and what each of them
    did; None if there is no such product, or compiled code does not take it."""
    parts = [(change, *part) for change in changes for part in _parts(change, top, top + shape[0])]
    if len(parts) != 1:
        return None
    change, matrix, rows = parts[0]
    cols = slice(left - change.cols[0], left + shape[1] - change.cols[0])
    whole = rows.stop - rows.start == shape[0] and cols.start >= 0 and left + shape[1] <= change.cols[1]
    if change.factors is None or not whole:
        return None
    inner = slice(rows.start - change.rows[0], rows.stop - change.rows[0])
    product = change.factors.product(matrix - change.matrices[0], rows=inner, cols=cols)
    if product is None:
        return None
    numel = shape[0] * shape[1]
    return product, tuple(Applied(numel=numel * (each is change), squared=0.0) for each in changes)


def _apply(work: Tensor, base: Tensor, change: Loaded, *, top: int, left: int) -> Applied:
    numel, squared = 0, 0.0
    cols = slice(max(change.cols[0], left), min(change.cols[1], left + work.shape[1]))
    if cols.start >= cols.stop:
        return Applied(numel=0, squared=0.0)
    across = slice(cols.start - left, cols.stop - left)
    for matrix, rows in _parts(change, top, top + len(work)):
        down = slice(rows.start + matrix * change.height - top, rows.stop + matrix * change.height - top)
        part = work[down, across]
        inner = slice(rows.start - change.rows[0], rows.stop - change.rows[0])
        if change.operator is not None:
            squared += _operate(change.operator, change, part, base[down, across], inner)
        elif change.factors is not None:
            inner_cols = slice(cols.start - change.cols[0], cols.stop - change.cols[0])
            add_delta(part, change.factors, matrix - change.matrices[0], rows=inner, cols=inner_cols)
        numel += part.numel()
    return Applied(numel=numel, squared=squared)


def _parts(change: Loaded, top: int, bottom: int) -> Iterator[tuple[int, slice]]:
    """The matrices of the region that rows [top, bottom) of the tensor touch, and their rows among them."""
    for matrix in range(*change.matrices):
        begin = matrix * change.height
        first, last = max(change.rows[0], top - begin), min(change.rows[1], bottom - begin)
        if first < last:
            yield matrix, slice(first, last)


def _operate(operator: Operator, change: Loaded, part: Tensor, base: Tensor, rows: slice) -> float:
    """Replaces `part` by what the operator makes of it; returns the sum of the squares of the change."""
    running, before = (part.T, base.T) if change.transposed else (part, base)
    if change.transposed:
        rows = slice(0, len(running))
    new = operator(running, before, change.tensors, change.options, rows)
    difference = new - running
    squared = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    if change.weight == 1:
        running.copy_(new)
    else:
        running.add_(difference, alpha=change.weight)
    return squared * change.weight**2
