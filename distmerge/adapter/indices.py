"""Places that an adapter's data names, checked before anything is written: operators take them on trust."""

from __future__ import annotations

from collections.abc import Iterable

from distmerge.adapter.changes import Change
from distmerge.adapter.load import read_view
from distmerge.adapter.peft_adapter import Adapter
from distmerge.errors import InputError, listing
from distmerge.numerics.tuners import misplaced


def check_indices(adapter: Adapter, changes: Iterable[Change]) -> None:
    """Raises InputError, naming tensors, for indices that point outside of what they index."""
    for change in changes:
        if not any("_indices" in role for role in change.tensors):
            continue
        rows, cols = (last - first for first, last in (change.region.rows, change.region.cols))
        size = (cols, rows) if change.transposed else (rows, cols)
        tensors = {role: read_view(adapter.folder, view) for role, view in change.tensors.items()}
        if outside := misplaced(tensors, size):
            names = [change.tensors[role].spec.name for role in outside]
            raise InputError(f"holds indices outside of a weight of {size}: {listing(names)}", where=adapter.where)
