"""LoRA arithmetic: products of factors added in float32, norms of deltas from their factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmerge.numerics.compiled import PANEL, Product, add_product, panels_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Deltas of n matrices, `scaling * b[i] @ a[i]`: `a` (n, r, in) and `b` (n, out, r) on the device of the merge,
    float32 or, for verification, float64. `panels` are those of `a` where compiled code adds them."""

    a: Tensor
    b: Tensor
    scaling: float
    panels: Tensor | None = None

    def transpose(self) -> Factors:
        """The factors of the transposed deltas, (in, out)."""
        return Factors(a=self.b.mT, b=self.a.mT, scaling=self.scaling)

    def laid_out(self) -> Factors:
        """The same factors as compiled code takes them, where there is any."""
        panels = panels_of(self.a)
        return self if panels is None else replace(self, b=self.b.contiguous(), panels=panels)

    def product(self, matrix: int, *, rows: slice, cols: slice) -> Product | None:
        """That part of delta number `matrix` for compiled code; None where it does not take it."""
        last = self.a.shape[2]
        if self.panels is None or cols.start % PANEL or (cols.stop % PANEL and cols.stop < last):
            return None
        panels = self.panels[matrix, cols.start // PANEL : -(-cols.stop // PANEL)]
        return Product(b=self.b[matrix, rows], panels=panels, scaling=self.scaling)


def add_delta(weight: Tensor, factors: Factors, matrix: int, *, rows: slice, cols: slice) -> None:
    """Adds to `weight` (rows, cols) in place that part of delta number `matrix`.

    The inner dimension is never split. torch's products of other shapes may still take other kernels and give other
    last bits (one to three rows do on some CPUs), so callers that want equal bits cut a tensor into equal blocks.
    """
    product = factors.product(matrix, rows=rows, cols=cols)
    if product is None:
        weight.addmm_(factors.b[matrix, rows], factors.a[matrix, :, cols], alpha=factors.scaling)
    else:
        add_product(weight, product)


def delta_norm(factors: Factors) -> float:
    """The Frobenius norm of all deltas `scaling * b @ a`, from the r x r Gram matrices: `tr((b'b)(aa'))`, float64."""
    squared = 0.0
    for a, b in zip(factors.a, factors.b, strict=True):
        wide_a, wide_b = a.double(), b.double()
        squared += float(torch.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).clamp_min(0))
    return abs(factors.scaling) * math.sqrt(squared)
