"""A wrong tensor gone through once more: where it is wrong, and how what was done to it agrees with its delta."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.audit.pairs import Pairs, Recipe
from distmerge.checkpoint.header import FLOATS
from distmerge.dense import Buffers
from distmerge.layout import Task
from distmerge.numerics.agreement import Agreement, agreement
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.noise import exactly
from distmerge.numerics.packed_distance import allowed
from distmerge.numerics.rounding import half_ulp

KEPT = 4  # wrong elements that are told with their values


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """A wrong element: its flat number, what is stored there, and what should be."""

    place: int
    stored: float
    expected: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What is wrong with a tensor of `numel` elements: the first wrong ones and how many there are, the rows that have
    some (by number, the tensor seen as rows of `row_numel`), how many rows should have been changed, and the agreement
    of what was done with what should have been, over the rows with wrong elements."""

    numel: int
    row_numel: int
    num_wrong: int
    first: tuple[Wrong, ...]
    rows: Tensor
    num_rows_due: int
    agreement: Agreement

    @property
    def is_few(self) -> bool:
        """True if so few elements are wrong that each is a thing of its own."""
        return self.num_wrong <= KEPT and self.num_wrong <= 0.1 * self.numel

    @property
    def is_unchanged(self) -> bool:
        """True if the rows with wrong elements hold the base's values."""
        return self.agreement.num_unchanged >= 0.999 * self.agreement.numel


def width_of(task: Task) -> int:
    """Elements of a row of `task`, whether it is changed or not."""
    return task.row_numel if task.changes else (task.source.shape[-1] if task.source.shape else 1)


def examine(pairs: Pairs, task: Task, buffers: Buffers) -> Damage:
    """Goes through all of `task`, a tensor with wrong elements."""
    width = max(1, width_of(task))
    recipe = pairs.recipe(task, buffers) if task.changes else None
    rows = torch.zeros(math.ceil(task.source.numel / width), dtype=torch.bool)
    due = torch.zeros_like(rows)
    total, first, num_wrong = Agreement(), list[Wrong](), 0
    for block in task.dense_blocks:
        begin = task.block(block)[0]
        base, stored, expected, room = _block(pairs, task, block, recipe, buffers)
        wrong = ~((stored.double() - expected).abs() <= room)
        places = wrong.nonzero().view(-1)
        num_wrong += len(places)
        for place in places[: KEPT - len(first)].tolist():
            first.append(Wrong(place=begin + place, stored=float(stored[place]), expected=float(expected[place])))
        rows[(begin + places).cpu() // width] = True
        due[(begin + (expected != base).nonzero().view(-1)).cpu() // width] = True
        numbers = (begin + torch.arange(len(base))) // width
        inside = rows[numbers].to(base.device)
        change, delta = stored.double() - base, expected - base
        # Packing other values than those expected loses as much again.
        total += agreement(change[inside], delta[inside], room[inside] * (1 if task.form is None else 2))
    return Damage(
        numel=task.source.numel,
        row_numel=width,
        num_wrong=num_wrong,
        first=tuple(first),
        rows=rows.nonzero().view(-1),
        num_rows_due=int(due.sum()),
        agreement=total,
    )


def _block(
    pairs: Pairs, task: Task, block: int, recipe: Recipe | None, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The base's values of a block in float64, what is stored, what should be, and how far these two may lie apart."""
    if recipe is not None or task.form is not None:
        base = pairs.base(buffers, task, block).double()
        exact = recipe.exact(base, block) if recipe else exactly(base)
        stored = pairs.stored(task, block)
        if task.form is not None:
            grid = pairs.head(task, task.form).grid(task, task.form, block)
            return base, stored, exact.values, allowed(stored, exact.values, exact.noise(), grid)
        return base, stored, exact.values, half_ulp(stored) + exact.noise()
    stored, expected = pairs.bytes(task, block), pairs.base_bytes(buffers, task, block)
    first, last = task.block(block)
    each = (last - first, -1)
    same = (stored == expected).view(each).all(dim=1)
    if task.dtype in FLOATS:
        stored, expected = (side.view(torch_dtype(task.dtype)) for side in (stored, expected))
    else:
        stored, expected = stored.view(each)[:, 0], expected.view(each)[:, 0]
    # Bytes are what counts: no room at all, and where they are the same all of it. NaN, which equals nothing, is left
    # out there.
    stored, values = torch.where(same, 0, stored), torch.where(same, 0, expected).double()
    return values, stored, values, same.double() - 0.5


def looks_like(pairs: Pairs, task: Task, other: Task, buffers: Buffers) -> str:
    """What the first block of the output's `task` has of `other`, a task of the same shape and dtype: `values` if it
    holds what that one should hold, `delta` if it holds its own base and the delta of that one, or nothing."""
    stored = pairs.stored(task, 0)
    own = pairs.base(buffers, task, 0).double()
    base = pairs.base(buffers, other, 0).double()
    expected = pairs.recipe(other, buffers).exact(base, 0).values if other.changes else base
    mine = pairs.recipe(task, buffers).exact(own, 0).values if task.changes else own
    # Noise does not count here: nearly all elements must agree, and where both expect the same none tells anything.
    for what, values in (("values", expected), ("delta", own + (expected - base)))[: 1 + bool(other.changes)]:
        tells = (values - mine).abs() > 2 * half_ulp(stored)
        close = (stored.double() - values).abs() <= 1.01 * half_ulp(stored)
        if int(tells.sum()) >= 4 and float(close[tells].double().mean()) > 0.99:
            return what
    return ""
