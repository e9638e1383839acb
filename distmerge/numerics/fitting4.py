"""Scales of 4-bit blocks fitted to the values: a smaller error than the largest magnitude gives, in the same format.

The error of a block is the sum of (value - scale * code value)^2. Every scale that is tried makes the block's largest
value one of the values that its codes can give, as the largest magnitude does: a smaller error that clips it, or rounds
it, makes a worse model, since the largest weights count for more than their squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.numerics.packing4 import Nested, codes, codes_for, nearest, nest, unnest

_LEAST_CODE = 0.5  # of the codes that the largest value may have
_NUM_STEPS = 1024
_CHUNK_NUMEL = 1 << 16  # what stays in a cache
_SMALLEST = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Scales of `nb` blocks, `absmax` float32 (nb,), and what tells the error of the codes that they gave: `product` is
    each block's sum(value * code value), `square` its sum(code value^2), float64 (nb,)."""

    absmax: Tensor
    product: Tensor
    square: Tensor

    def error(self, absmax: Tensor) -> Tensor:
        """Each block's squared error with the same codes and the scales `absmax`, less its sum(value^2): float64
        (nb,). With the codes that are best for `absmax` it is no larger."""
        scale = absmax.double()
        return scale * (scale * self.square - 2 * self.product)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The scales of a tensor as they are stored: `absmax`, float32 (nb,), is what they are read back as, and `nested`
    their 8-bit form, if they have one. `fitted` says whose they are."""

    absmax: Tensor
    nested: Nested | None
    fitted: bool


def fit(values: Tensor, absmax: Tensor, quant_map: Tensor, *, blocksize: int) -> tuple[Scales, Scales]:
    """The plain scales `absmax` of `values`, and those that were fitted: no block's error is larger with them.

    `values` is a flat float tensor that begins with a block, and ends with one or with its tensor; `absmax`, float32
    (nb,), holds the largest magnitudes of its blocks. Every block is fitted by itself. A scale may be negative, which
    mirrors the codes: those of NF4 are not symmetric.
    """
    plain = codes(values, absmax, quant_map, first=0, blocksize=blocksize, numel=len(values))
    before = _scales(values, plain, absmax, quant_map, blocksize)
    found = torch.cat([absmax[:0], *(_search(*part, quant_map) for part in _chunks(values, absmax, blocksize))])
    better = codes_for(values, found, quant_map, first=0, blocksize=blocksize)
    after = _scales(values, better, found, quant_map, blocksize)
    keep = after.error(found) < before.error(absmax)
    return before, Scales(
        absmax=torch.where(keep, found, absmax),
        product=torch.where(keep, after.product, before.product),
        square=torch.where(keep, after.square, before.square),
    )


def settle(plain: Scales, fitted: Scales, *, double: bool) -> Settled:
    """The scales to store for a whole tensor, those of all its blocks given; with `double` in 8 bits, and then the
    plain ones if rounding cost the others their advantage. `codes_for` gives their codes: the squared error of the
    tensor is no larger than bitsandbytes' own."""
    if not double:
        return Settled(absmax=fitted.absmax, nested=None, fitted=True)
    settled = [(each, nested := nest(each.absmax), unnest(nested)) for each in (plain, fitted)]
    errors = [float(each.error(read).sum()) for each, _, read in settled]
    better = errors[1] < errors[0]
    _, nested, read = settled[better]
    return Settled(absmax=read, nested=nested, fitted=better)


def _search(rows: Tensor, absmax: Tensor, quant_map: Tensor) -> Tensor:
    """The best of the scales that give the largest value of each of `rows`, float32 (nb, blocksize), a code of its own,
    as far as codes tell that are nearest but for a step."""
    steps = (torch.arange(_NUM_STEPS, device=rows.device) + 0.5) / (_NUM_STEPS / 2) - 1
    table = quant_map[nearest(steps, quant_map).int()]
    scaled, coded = torch.empty_like(rows), torch.empty_like(rows)
    index = torch.empty_like(rows, dtype=torch.int32)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    best, least = absmax, torch.full_like(absmax, torch.inf)
    ordered = quant_map.sort().values
    mirrored = torch.equal(ordered, -ordered.flip(0))  # a negative scale would change nothing
    for code in quant_map[quant_map.abs() >= _LEAST_CODE].tolist():
        if mirrored and code < 0:
            continue
        scale = largest.abs() / code if mirrored else largest / code
        safe = torch.where(scale.abs() < _SMALLEST, _SMALLEST, scale)
        torch.mul(rows, (_NUM_STEPS / 2 / safe)[:, None], out=scaled)
        index.copy_(scaled.add_(_NUM_STEPS / 2).clamp_(0, _NUM_STEPS - 1)).clamp_(0)  # NaN becomes anything
        torch.index_select(table, 0, index.view(-1), out=coded.view(-1))
        square = torch.mul(coded, coded, out=scaled).sum(1)
        product = coded.mul_(rows).sum(1)
        error = scale * (scale * square - 2 * product)  # less sum(value^2)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _scales(values: Tensor, found: Tensor, absmax: Tensor, quant_map: Tensor, blocksize: int) -> Scales:
    """`absmax` with the sums of the codes `found`, uint8 (n,)."""
    coded = quant_map.index_select(0, found.int())
    sums = [
        ((rows := coded_rows.double()).mul(value_rows).sum(1), rows.square().sum(1))
        for (value_rows, _), (coded_rows, _) in zip(
            _chunks(values, absmax, blocksize), _chunks(coded, absmax, blocksize), strict=True
        )
    ]
    empty = absmax[:0].double()
    product, square = (torch.cat([empty, *(each[k] for each in sums)]) for k in (0, 1))
    return Scales(absmax=absmax, product=product, square=square)


def _chunks(values: Tensor, absmax: Tensor, blocksize: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`values` as float32 rows (nb, blocksize), a few blocks at a time, with their `absmax`; a last one that is short
    is filled with zeros, which every scale fits."""
    count = max(_CHUNK_NUMEL // blocksize, 1)
    for first in range(0, len(absmax), count):
        part = values[first * blocksize : (first + count) * blocksize].float()
        rows = torch.nn.functional.pad(part, (0, -len(part) % blocksize)).view(-1, blocksize)
        yield rows, absmax[first : first + count]
