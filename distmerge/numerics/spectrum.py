"""Leading singular values of a sum of products of factors, from Gram matrices as small as their r."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmerge.numerics.apply import Loaded

_COUNT = 16
# Gram matrices square the values: what lies below is rounding noise.
_RESOLVED = 1e-7


def singular_values(changes: Sequence[Loaded], *, max_r: int) -> tuple[float, ...]:
    """The largest singular values, 16 at most and in falling order, of what `changes` together add to a tensor.

    With all factors b side by side and all a below one another the delta is b a, and its singular values are the roots
    of the eigenvalues of (b'b)(aa'); float64, b a is never built. Of a stack of matrices the root mean square over the
    matrices that are changed. Empty where a change is no product of factors, or their r are more than `max_r` together.
    """
    placed = [(change, change.factors) for change in changes if change.factors is not None]
    if not changes or len(placed) < len(changes) or sum(factors.a.shape[1] for _, factors in placed) > max_r:
        return ()
    matrices = sorted({matrix for change in changes for matrix in range(*change.matrices)})
    found = torch.zeros(_COUNT, dtype=torch.float64)
    length = 0
    for matrix in matrices:
        here = [(change, factors) for change, factors in placed if matrix in range(*change.matrices)]
        tall = _gram([(change.rows, factors.b[matrix - change.matrices[0]].T) for change, factors in here])
        wide = _gram([(change.cols, factors.a[matrix - change.matrices[0]]) for change, factors in here])
        scaling = [factors.scaling for _, factors in here for _ in range(factors.a.shape[1])]
        squares = _squares(tall, wide, torch.tensor(scaling, dtype=torch.float64))[:_COUNT]
        found[: len(squares)] += squares
        length = max(length, len(squares))
    if not length:
        return ()
    values = (found[:length] / len(matrices)).sqrt()
    values = torch.where(values < _RESOLVED * values.max(), torch.zeros_like(values), values)
    return tuple(values.tolist())


def _squares(tall: Tensor, wide: Tensor, scaling: Tensor) -> Tensor:
    """The eigenvalues of `tall @ diag(scaling) @ wide @ diag(scaling)`, both semidefinite, in falling order."""
    values, vectors = torch.linalg.eigh(tall)
    root = vectors * values.clamp_min(0).sqrt() * scaling[:, None]
    squares: Tensor = torch.linalg.eigvalsh(root.T @ wide @ root)
    return squares.clamp_min(0).flip(0)


def _gram(factors: Sequence[tuple[tuple[int, int], Tensor]]) -> Tensor:
    """The products of all rows of all `factors` (r, n), float64, on the host; the columns of each lie at a place
    [first, last) among those of the whole matrix, outside of which it is zero."""
    lines = []
    for (first, last), one in factors:
        blocks = []
        for (begin, end), other in factors:
            low, high = max(first, begin), max(min(last, end), first, begin)
            blocks.append(one[:, low - first : high - first].double() @ other[:, low - begin : high - begin].double().T)
        lines.append(torch.cat(blocks, dim=1))
    return torch.cat(lines).cpu()
