"""LoRA arithmetic: products of factors added in float32, norms of deltas from their factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Deltas of n matrices, `scaling * b[i] @ a[i]`: `a` (n, r, in) and `b` (n, out, r) on the device of the merge,
    float32 or, for verification, float64."""

    a: Tensor
    b: Tensor
    scaling: float

    def transpose(self) -> Factors:
        """The factors of the transposed deltas, (in, out)."""
        return Factors(a=self.b.mT, b=self.a.mT, scaling=self.scaling)


def add_delta(weight: Tensor, factors: Factors, matrix: int, *, rows: slice, cols: slice) -> None:
    """Adds to `weight` (rows, cols) in place that part of delta number `matrix`.

    The inner dimension is never split. Products of other shapes may still take other kernels and give other last bits
    (one to three rows do on some CPUs), so callers that want equal bits cut a tensor into equal blocks.
    """
    weight.addmm_(factors.b[matrix, rows], factors.a[matrix, :, cols], alpha=factors.scaling)


def delta_norm(factors: Factors) -> float:
    """The Frobenius norm of all deltas `scaling * b @ a`, from the r x r Gram matrices: `tr((b'b)(aa'))`, float64."""
    squared = 0.0
    for a, b in zip(factors.a, factors.b, strict=True):
        wide_a, wide_b = a.double(), b.double()
        squared += float(torch.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).clamp_min(0))
    return abs(factors.scaling) * math.sqrt(squared)
