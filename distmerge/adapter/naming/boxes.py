"""Boxes of a parameter: read off the strides of a view, and checked to cover it once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from distmerge.adapter.naming.slots import Slot
from distmerge.adapter.views import contiguous_stride


def box_of(
    name: str, shape: tuple[int, ...], offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> Slot | None:
    """The tensor `name` as a box of a contiguous parameter of `shape`, of which it is the view with this `offset`,
    `size` and `stride` (all in elements); None if the view is no box, or empty."""
    if 0 in shape or 0 in size:
        return None
    steps = contiguous_stride(shape)
    dims = {step: dim for dim, step in enumerate(steps) if shape[dim] > 1}  # dimensions of size 1 share their steps
    order: list[int | None] = [
        dims.pop(step, None) if length > 1 else None for length, step in zip(size, stride, strict=True)
    ]
    if any(dim is None and length > 1 for dim, length in zip(order, size, strict=True)):
        return None
    starts = tuple(offset // step % length if length > 1 else 0 for step, length in zip(steps, shape, strict=True))
    lengths = {dim: length for dim, length in zip(order, size, strict=True) if dim is not None}
    sizes = tuple(lengths.get(dim, 1) for dim in range(len(shape)))
    inside = all(start + length <= whole for start, length, whole in zip(starts, sizes, shape, strict=True))
    if not inside or sum(start * step for start, step in zip(starts, steps, strict=True)) != offset:
        return None
    thin = iter([dim for dim in range(len(shape)) if dim not in lengths])
    filled = [next(thin, None) if dim is None else dim for dim in order]
    full = tuple(dim for dim in filled if dim is not None)
    return Slot(name=name, starts=starts, sizes=sizes, order=full) if len(full) == len(size) else None


def is_partition(shape: tuple[int, ...], slots: Sequence[Slot]) -> bool:
    """True if every element of a parameter of `shape` is in exactly one of the boxes `slots`."""
    if sum(slot.numel for slot in slots) != math.prod(shape):
        return False
    # Two boxes that overlap share a corner of the grid that the starts of all boxes make.
    cuts = [sorted({slot.starts[dim] for slot in slots}) for dim in range(len(shape))]
    seen: set[tuple[int, ...]] = set()
    for slot in slots:
        if any(start + length > whole for start, length, whole in zip(slot.starts, slot.sizes, shape, strict=True)):
            return False
        for corner in itertools.product(*map(_between, cuts, slot.starts, slot.sizes)):
            if corner in seen:
                return False
            seen.add(corner)
    return True


def _between(cuts: list[int], start: int, length: int) -> list[int]:
    return [start] if length == 1 else [cut for cut in cuts if start <= cut < start + length]
