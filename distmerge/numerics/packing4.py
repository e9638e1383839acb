"""Floats to 4-bit blockwise codes, byte for byte as bitsandbytes packs them on the CPU.

Block i of a tensor holds the elements [i * blocksize, (i + 1) * blocksize) of its flattened rows; only the last one may
be shorter. Each is scaled by its largest magnitude, and each element becomes the nearest code. With double
quantization the scales themselves are stored in 8 bits, in blocks of 256, after their mean is taken off
(bitsandbytes 0.50, functional.quantize_4bit, backends/default/ops.py, csrc/cpu_ops.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.numerics import nf4

NESTED_BLOCKSIZE = 256
_SMALLEST = 1e-38
_NUM_BINS = 4096
_NESTED_NUMEL = 1 << 17  # scales that are nested at once
_STEPS = 65535  # bitsandbytes looks 8-bit codes up in a table of so many steps from -1 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """The scales of `nb` blocks in 8 bits: `codes` uint8 (nb,), `absmax` float32 (ceil(nb / 256),), and the mean
    `offset` that was taken off. Read back by nf4.nested_absmax with `dynamic_map()`."""

    codes: Tensor
    absmax: Tensor
    offset: float


def pack(values: Tensor, quant_map: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """A whole flat tensor of n floats in 4 bits: its bytes, uint8 (ceil(n / 2),), and its scales, float32."""
    absmax = block_absmax(values, blocksize)
    found = codes(values, absmax, quant_map, first=0, blocksize=blocksize, numel=len(values))
    return pair(found, quant_map), absmax


def block_absmax(values: Tensor, blocksize: int) -> Tensor:
    """The largest magnitude of each block, float32 (ceil(n / blocksize),).

    `values` is a flat float tensor that begins with a block; a last block that is shorter is the tensor's last.
    """
    whole = len(values) // blocksize * blocksize
    low, high = torch.aminmax(values[:whole].view(-1, blocksize), dim=1)
    found = torch.maximum(high, -low).float()
    if whole == len(values):
        return found
    # A short block of zeros is stored with this scale, a whole one with 0.
    return torch.cat([found, values[whole:].abs().amax().float().clamp_min(_SMALLEST)[None]])


def codes(values: Tensor, absmax: Tensor, quant_map: Tensor, *, first: int, blocksize: int, numel: int) -> Tensor:
    """The nearest code of each of `values`, uint8 (n,).

    `values` are the elements from `first` on of a flat tensor of `numel` elements, `absmax` (float32) the largest
    magnitudes of the blocks from `first // blocksize` on. Whole blocks are multiplied by the reciprocal of theirs, and
    the last one, if it is short, is divided by it: the two round differently.
    """
    scaled = torch.empty_like(values, dtype=torch.float32).copy_(values)
    whole = min(max(numel // blocksize * blocksize - first, 0), len(scaled))
    bound = absmax.clamp_min(_SMALLEST)
    nf4.scale(scaled[:whole], 1 / bound, first=first, blocksize=blocksize)
    if whole < len(scaled):
        scaled[whole:].div_(bound[-1])
    return nearest(scaled, quant_map)


def codes_for(values: Tensor, absmax: Tensor, quant_map: Tensor, *, first: int, blocksize: int) -> Tensor:
    """The codes, uint8 (n,), whose values times `absmax` lie nearest to `values`, whatever the scales are.

    Where scales were rounded or fitted these are better than `codes`. `absmax` is as there, but may be zero, and
    any code then means 0, or negative.
    """
    scaled = torch.empty_like(values, dtype=torch.float32).copy_(values)
    bound = torch.where(absmax < 0, absmax.clamp_max(-_SMALLEST), absmax.clamp_min(_SMALLEST))
    nf4.scale(scaled, 1 / bound, first=first, blocksize=blocksize)
    return nearest(scaled, quant_map)


def nearest(scaled: Tensor, quant_map: Tensor) -> Tensor:
    """The code, uint8, whose value in `quant_map` (float32, any order) lies nearest to each of `scaled` (float32, any
    shape, overwritten); of two that are as near the smaller value's."""
    ordered, order = torch.sort(quant_map, stable=True)
    edges, order = (ordered[:-1] + ordered[1:]) / 2, order.to(torch.uint8)
    scaled.clamp_(-1, 1)
    home = _bins(edges)
    if scaled.numel() < _NUM_BINS * 4 or bool((home[1:] == home[:-1]).any()):
        return order[torch.bucketize(scaled, edges, out_int32=True)]
    # Five times as fast: a bin holds one edge at most, and only there are values compared.
    below = torch.searchsorted(home, torch.arange(_NUM_BINS, dtype=torch.int32, device=home.device))
    edge = torch.full((_NUM_BINS,), torch.inf, device=home.device).index_copy_(0, home.long(), edges)
    index = _bins(scaled).view(-1)
    above = scaled.view(-1) > edge.index_select(0, index)
    low, high = order[below].index_select(0, index), order[(below + 1).clamp_max(len(edges))].index_select(0, index)
    return torch.where(above, high, low).view(scaled.shape)


def _bins(scaled: Tensor) -> Tensor:
    """The number, int32, of one of `_NUM_BINS` even stretches from -1 to 1; that of a larger value is no smaller."""
    return ((scaled + 1) * (_NUM_BINS / 2)).int().clamp_(0, _NUM_BINS - 1)


def pair(codes: Tensor, quant_map: Tensor) -> Tensor:
    """`codes`, uint8 (n,), two a byte, the first in the high nibble: uint8 (ceil(n / 2),). An odd last one is followed
    by the code of zero."""
    if len(codes) % 2:
        codes = torch.cat([codes, nearest(torch.zeros(1, device=codes.device), quant_map)])
    return (codes[::2] << 4) | codes[1::2]


def unpacked(codes: Tensor, read: Tensor, quant_map: Tensor, *, first: int, blocksize: int) -> Tensor:
    """What `codes`, uint8 (n,), mean under the scales `read`, float32 (n,); `first` and `blocksize` as for `codes`."""
    values = quant_map.index_select(0, codes.int())
    nf4.scale(values, read, first=first, blocksize=blocksize)
    return values


def through(
    values: Tensor, absmax: Tensor, read: Tensor, quant_map: Tensor, *, first: int, blocksize: int, numel: int
) -> Tensor:
    """What `values` are unpacked to, float32, after they were packed with the scales `absmax`, which are read back as
    `read`. The other arguments are those of `codes`."""
    found = codes(values, absmax, quant_map, first=first, blocksize=blocksize, numel=numel)
    return unpacked(found, read, quant_map, first=first, blocksize=blocksize)


def nest(absmax: Tensor) -> Nested:
    """The scales `absmax`, float32 (nb,), in 8 bits. On the CPU as bitsandbytes does there: values are looked up in a
    table of 65536 steps, coarser than the codes near 0; elsewhere each gets its nearest code.

    The mean is torch's on the same device, on the CPU in the order that one thread adds in.
    """
    if not len(absmax):
        return Nested(codes=torch.empty_like(absmax, dtype=torch.uint8), absmax=absmax.clone(), offset=0.0)
    offset, table = mean(absmax), dynamic_map().to(absmax.device)
    parts = [absmax[first : first + _NESTED_NUMEL] for first in range(0, len(absmax), _NESTED_NUMEL)]
    found = [_nested(part - offset, table) for part in parts]
    return Nested(
        codes=torch.cat([codes for codes, _ in found]),
        absmax=torch.cat([scales for _, scales in found]),
        offset=float(offset),
    )


def _nested(rest: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes and their scales for `rest`, which begins with a block of them."""
    filled = torch.nn.functional.pad(rest, (0, -len(rest) % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    scales = filled.abs().amax(1)
    scaled = (filled * (1 / scales)[:, None]).clamp_(-1, 1)
    if rest.device.type == "cpu":
        step = ((scaled + 1) * 0.5 * _STEPS + 0.5).nan_to_num_(nan=0.0)  # a block of zeros gets code 0
        found = _steps(table)[step.int()]
    else:
        found = nearest(scaled.nan_to_num_(nan=0.0), table)
    return found.view(-1)[: len(rest)].clone(), scales


def unnest(nested: Nested) -> Tensor:
    """The scales, float32 (nb,), that `nested` is read back as."""
    table = dynamic_map().to(nested.codes.device)
    sizes = {"first": 0, "blocksize": NESTED_BLOCKSIZE}
    return nf4.nested_absmax(nested.codes, table, nested.absmax, **sizes, offset=nested.offset)


def mean(absmax: Tensor) -> Tensor:
    """The mean of `absmax`, float32 (n,), n > 0, as torch takes it on one thread of the CPU, or on its accelerator.

    torch splits more than 32768 elements among its threads and adds the parts in another order, so that the last bit
    depends on their number; each of several rows it leaves to a single thread.
    """
    return absmax.expand(2, -1).mean(1)[0] if absmax.device.type == "cpu" else absmax.mean()


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic data type: for each of seven decades its fractions, 0 and 1 (arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        fractions = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [*fractions, *(-fraction for fraction in fractions)]
    return torch.tensor(sorted(values))


def _steps(table: Tensor) -> Tensor:
    """The code, uint8 (65536,), that is nearest to each step from -1 to 1."""
    steps = -1 + 2 * torch.arange(_STEPS + 1, dtype=torch.float32, device=table.device) / _STEPS
    return nearest(steps, table)
