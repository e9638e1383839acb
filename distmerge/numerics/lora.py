"""LoRA arithmetic: deltas added in float32, norms of deltas from their factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One delta, `scaling * b @ a`: `a` (r, in) and `b` (out, r), float32 on the device of the merge."""

    a: Tensor
    b: Tensor
    scaling: float


def add_deltas(weight: Tensor, factors: tuple[Factors, ...], *, rows: slice, cols: slice) -> int:
    """Adds to `weight`, float32 (rows, cols), that part of every delta, one after another, in place; returns how many.

    The inner dimension is never split. Products of other shapes may still take other kernels and give other last bits
    (one to three rows do on some CPUs), so callers that want equal bits cut a tensor into equal blocks.
    """
    added = 0
    for factor in factors:
        weight.addmm_(factor.b[rows], factor.a[:, cols], alpha=factor.scaling)
        added += 1
    return added


def delta_norm(factor: Factors) -> float:
    """The Frobenius norm of `scaling * b @ a`, from the r x r Gram matrices: `tr((b'b)(aa'))`, in float64."""
    a, b = factor.a.double(), factor.b.double()
    squared = torch.sum((b.T @ b) * (a @ a.T)).clamp_min(0)
    return abs(factor.scaling) * float(squared.sqrt())
