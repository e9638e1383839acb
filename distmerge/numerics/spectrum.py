"""Norms and leading singular values of sums of products of factors, from Gram matrices as small as their r."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.numerics.apply import Loaded
from distmerge.numerics.lora import delta_norm

_COUNT = 16
# Gram matrices square the values: what lies below is rounding noise.
_RESOLVED = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What changes add to a tensor, as far as their factors tell it: the norm of each, 0 for an operator, and the
    largest singular values of all of them together."""

    norms: tuple[float, ...] = ()
    singular: tuple[float, ...] = ()


def whole_of(changes: Sequence[Loaded], *, max_r: int) -> Whole:
    """The norms of `changes`, and the singular values, 16 at most and in falling order, of what they add together.

    With all factors b side by side and all a below one another the delta is b a, and its singular values are the roots
    of the eigenvalues of (b'b)(aa'); float64, b a is never built. Of a stack of matrices the root mean square over the
    matrices that are changed. Empty where a change is no product of factors, or their r are more than `max_r` together.
    """
    placed = [(change, change.factors) for change in changes if change.factors is not None]
    if not changes or len(placed) < len(changes) or sum(factors.a.shape[1] for _, factors in placed) > max_r:
        return Whole(norms=tuple(delta_norm(change.factors) if change.factors else 0.0 for change in changes))
    matrices = sorted({matrix for change in changes for matrix in range(*change.matrices)})
    norms = [0.0] * len(changes)
    found = torch.zeros(_COUNT, dtype=torch.float64)
    length = 0
    for matrix in matrices:
        here = [i for i, change in enumerate(changes) if matrix in range(*change.matrices)]
        factors = [(placed[i][0], placed[i][1], matrix - placed[i][0].matrices[0]) for i in here]
        tall = _gram([(change.rows, own.b[at].T) for change, own, at in factors])
        wide = _gram([(change.cols, own.a[at]) for change, own, at in factors])
        begin = 0
        for i, (_, own, _) in zip(here, factors, strict=True):
            end = begin + own.a.shape[1]
            product = torch.sum(tall[begin:end, begin:end] * wide[begin:end, begin:end])
            norms[i] += own.scaling**2 * max(float(product), 0.0)
            begin = end
        scaling = [own.scaling for _, own, _ in factors for _ in range(own.a.shape[1])]
        squares = _squares(tall, wide, torch.tensor(scaling, dtype=torch.float64))[:_COUNT]
        found[: len(squares)] += squares
        length = max(length, len(squares))
    values = (found[:length] / max(len(matrices), 1)).sqrt()
    if length:
        values = torch.where(values < _RESOLVED * values.max(), torch.zeros_like(values), values)
    return Whole(norms=tuple(math.sqrt(norm) for norm in norms), singular=tuple(values.tolist()))


def _squares(tall: Tensor, wide: Tensor, scaling: Tensor) -> Tensor:
    """The eigenvalues of `tall @ diag(scaling) @ wide @ diag(scaling)`, both semidefinite, in falling order."""
    root, failed = torch.linalg.cholesky_ex(tall)
    if failed:  # not of full rank
        values, vectors = torch.linalg.eigh(tall)
        root = vectors * values.clamp_min(0).sqrt()
    root = root * scaling[:, None]
    squares: Tensor = torch.linalg.eigvalsh(root.T @ wide @ root)
    return squares.clamp_min(0).flip(0)


def _gram(factors: Sequence[tuple[tuple[int, int], Tensor]]) -> Tensor:
    """The products of all rows of all `factors` (r, n), float64, on the host; the columns of each lie at a place
    [first, last) among those of the whole matrix, outside of which it is zero."""
    wide = [(place, one.double()) for place, one in factors]
    lines = []
    for (first, last), one in wide:
        blocks = []
        for (begin, end), other in wide:
            low, high = max(first, begin), max(min(last, end), first, begin)
            blocks.append(one[:, low - first : high - first] @ other[:, low - begin : high - begin].T)
        lines.append(torch.cat(blocks, dim=1))
    return torch.cat(lines).cpu()
