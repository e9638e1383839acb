"""Whether an adapter says the same of a tied embedding and of its head: read from its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distmerge.adapter.changes import LORA, Change
from distmerge.adapter.load import read_view
from distmerge.adapter.peft_adapter import Adapter
from distmerge.adapter.tied import Tie
from distmerge.adapter.views import View
from distmerge.checkpoint.packing import Stored

_STEP_NUMEL = 1 << 22


def say_the_same(
    adapters: Sequence[Adapter],
    tie: Tie,
    changes: Mapping[str, tuple[Change, ...]],
    replaced: Mapping[str, tuple[int, Stored]],
    *,
    shared_table: bool,
) -> bool:
    """True if embedding and head are changed alike: equal tables in place of both, and equal deltas. `shared_table`
    says that a table in place of the embedding's counts for the head too."""
    first, second = (replaced.get(name) for name in (tie.embedding, tie.head))
    mine, theirs = changes.get(tie.embedding, ()), changes.get(tie.head, ())
    if len(mine) != len(theirs) or not (mine or second):
        return False
    if first is not None and second is not None:
        if not _equal_tables(adapters, first, second):
            return False
    elif second is not None or (first is not None and not shared_table):
        return False
    return all(_equal_changes(adapters[a.adapter], a, b) for a, b in zip(mine, theirs, strict=True))


def _equal_tables(adapters: Sequence[Adapter], first: tuple[int, Stored], second: tuple[int, Stored]) -> bool:
    if first[0] != second[0] or first[1].shape != second[1].shape or first[1].dtype != second[1].dtype:
        return False
    return equal_views(adapters[first[0]].folder, *(View.whole(stored.data) for stored in (first[1], second[1])))


def equal_views(folder: Path, first: View, second: View) -> bool:
    """True if two views of an adapter's tensors hold the same values; reads them piece by piece."""
    if first.size != second.size:
        return False
    rows, width = first.size[0], max(1, first.numel // first.size[0])
    step = max(1, _STEP_NUMEL // width)
    for top in range(0, rows, step):
        parts = [read_view(folder, view.narrow(0, top, min(step, rows - top))) for view in (first, second)]
        if not torch.equal(parts[0], parts[1]):
            return False
    return True


def _equal_changes(adapter: Adapter, mine: Change, theirs: Change) -> bool:
    alike = (mine.adapter, mine.operator, mine.weight) == (theirs.adapter, theirs.operator, theirs.weight)
    if not alike or mine.options != theirs.options:
        return False
    if mine.operator == "rows":
        return torch.equal(*(read_view(adapter.folder, change.tensors["rows"]) for change in (mine, theirs)))
    if mine.operator != LORA:
        return False
    return all(torch.equal(x, y) for x, y in zip(_factors(adapter, mine), _factors(adapter, theirs), strict=True))


def _factors(adapter: Adapter, change: Change) -> tuple[Tensor, Tensor]:
    """The factors (rows, r) and (r, cols) of the delta as the tensor holds it."""
    a, b = (read_view(adapter.folder, change.tensors[role]) for role in "ab")
    return (a.mT, b.mT) if change.transposed else (b, a)
