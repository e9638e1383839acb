"""4-bit blockwise codes to floats, exactly as bitsandbytes' CUDA kernels do: one product in float32 per element.

A byte holds two codes, the first in its high nibble; element i of the flattened tensor belongs to block
`i // blocksize` (bitsandbytes, csrc/kernels.cu, kDequantizeBlockwise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tensor in 4 bits with double quantization: `codes` uint8 (n / 2, 1), `absmax` uint8 (num_blocks,),
    `nested_absmax` float32 (num_blocks / 256,), `nested_quant_map` float32 (256,)."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor
    nested_offset: float


def pair_table(quant_map: Tensor) -> Tensor:
    """For each byte value its two floats, high nibble first, as one int64: shape (256,), on `quant_map`'s device.

    `quant_map` is float32 (16,). A gather of 8-byte pairs is twice as fast as one of single codes.
    """
    byte = torch.arange(256, device=quant_map.device)
    return torch.stack([quant_map[byte >> 4], quant_map[byte & 15]], dim=1).contiguous().view(torch.int64).view(256)


def unpack(packed: Tensor, table: Tensor, index: Tensor, out: Tensor) -> None:
    """Writes the codes of `packed`, uint8 or uint16 (n,), as pairs of floats to `out`, float32 (2 n,); `index` is int32
    (n,) scratch."""
    index.copy_(packed)
    torch.index_select(table, 0, index, out=out.view(torch.int64))


def scale(values: Tensor, absmax: Tensor, *, first: int, blocksize: int) -> None:
    """Multiplies `values`, float32, in place by their blocks' `absmax`, float32.

    `first` is the index of `values[0]` in the whole tensor and `absmax[0]` the scale of its block.
    """
    head = min(-first % blocksize, len(values))
    whole = (len(values) - head) // blocksize
    used = 0
    if head:
        values[:head].mul_(absmax[0])
        used = 1
    values[head : head + whole * blocksize].view(whole, blocksize).mul_(absmax[used : used + whole, None])
    tail = values[head + whole * blocksize :]
    if len(tail):
        tail.mul_(absmax[used + whole])


def nested_absmax(codes: Tensor, table: Tensor, scales: Tensor, *, first: int, blocksize: int, offset: float) -> Tensor:
    """The float32 `absmax` that double quantization stored as `codes`, uint8 (n,).

    `table` is float32 (256,); `scales` those of the blocks from `first // blocksize` on, `first` being the index of
    `codes[0]`; `offset` the mean that was subtracted before.
    """
    values = table[codes.long()]
    scale(values, scales, first=first, blocksize=blocksize)
    return values.add_(torch.tensor(offset, dtype=torch.float32, device=values.device))


def pack(weight: Tensor, quant_map: Tensor, *, blocksize: int) -> Packed:
    """`weight` in 4 bits, each block scaled by its largest magnitude, each element the nearest code; the scales in
    8 bits after their mean is taken off. The number of elements must be a multiple of `blocksize`, itself even."""
    blocks = weight.float().view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(1e-38)[:, None]
    codes = torch.bucketize(scaled, (quant_map[:-1] + quant_map[1:]) / 2).to(torch.uint8).view(-1, 2)
    offset = absmax.mean()
    nested, table = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256), dynamic_map()
    nested_absmax = nested.abs().amax(1).clamp_min(1e-38)
    scales = torch.bucketize(nested / nested_absmax[:, None], (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return Packed(
        codes=((codes[:, 0] << 4) | codes[:, 1])[:, None].contiguous(),
        absmax=scales.view(-1)[: len(absmax)].clone(),
        nested_absmax=nested_absmax,
        nested_quant_map=table,
        nested_offset=float(offset),
    )


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic data type: for each of seven decades its fractions, 0 and 1 (arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        fractions = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [*fractions, *(-fraction for fraction in fractions)]
    return torch.tensor(sorted(values))


# bitsandbytes' FP4, by code: 1 sign, 2 exponent and 1 mantissa bit (functional.get_4bit_type).
FP4 = torch.tensor([0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0]) / 12


def codes_of(weight: Tensor, quant_map: Tensor, *, blocksize: int) -> Tensor:
    """The bytes, uint8 (n / 2,), in which bitsandbytes packs the flat `weight`, whose length is even: each block times
    the reciprocal of its largest magnitude (a last one that is not full is divided by it), then the nearest code."""
    values = weight.float()
    whole = len(values) // blocksize * blocksize
    blocks = values[:whole].view(-1, blocksize)
    scaled = (blocks * (1 / blocks.abs().amax(1).clamp_min(1e-38))[:, None]).view(-1)
    tail = values[whole:]
    if len(tail):
        scaled = torch.cat([scaled, tail / tail.abs().amax().clamp_min(1e-38)])
    ordered, order = torch.sort(quant_map)
    codes = order[torch.bucketize(scaled.clamp(-1, 1), (ordered[:-1] + ordered[1:]) / 2)].to(torch.uint8).view(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1]
