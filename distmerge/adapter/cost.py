"""The memory of what operators compute before their first block, found by computing it without data."""

from __future__ import annotations

import json
from functools import lru_cache

import torch

from distmerge.adapter.changes import ADD, LORA, NOTHING, Change, Computed
from distmerge.numerics.tuners import LOW_RANK, OPERATORS

_INTEGERS = ("I64", "I32", "U8")
# While a factor is computed in float64 its inputs are there, the result and a temporary of its size.
_FACTOR_NBYTES = 3 * 8
# Rotations are solved for in float32, with several temporaries of their size.
_PREPARED_NBYTES = 14 * 4


def computed(change: Change) -> Computed:
    """The memory, at most, of factors or other tensors that `change` computes from its own."""
    if change.operator in (LORA, ADD):
        return NOTHING
    inputs = tuple((role, view.size, view.spec.dtype in _INTEGERS) for role, view in change.tensors.items())
    return _measured(change.operator, inputs, json.dumps(change.options, sort_keys=True))


@lru_cache(maxsize=4096)
def _measured(operator: str, inputs: tuple[tuple[str, tuple[int, ...], bool], ...], options: str) -> Computed:
    tensors = {
        role: torch.empty(size, dtype=torch.int64 if whole else torch.float64, device="meta")
        for role, size, whole in inputs
    }
    given = sum(tensor.numel() for tensor in tensors.values())
    try:
        if operator in LOW_RANK:
            b, a = LOW_RANK[operator](tensors, json.loads(options))
            made = b.numel() + a.numel()
            nbytes = _FACTOR_NBYTES * made + 8 * given + 24 * b.shape[1] ** 2
            return Computed(nbytes=nbytes, held_nbytes=8 * made)  # and panels of one of them
        prepared = OPERATORS[operator].prepare(tensors, json.loads(options))
        made = sum(t.numel() for t in prepared.values() if all(t is not own for own in tensors.values()))
    except (RuntimeError, NotImplementedError):  # what looks at values cannot be computed without them
        made = 2 * given
    return Computed(nbytes=_PREPARED_NBYTES * made, held_nbytes=4 * made)
