"""4-bit blockwise codes to floats, exactly as bitsandbytes' CUDA kernels do: one product in float32 per element.

A byte holds two codes, the first in its high nibble; element i of the flattened tensor belongs to block
`i // blocksize` (bitsandbytes, csrc/kernels.cu, kDequantizeBlockwise).
"""

from __future__ import annotations

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

# bitsandbytes' FP4, by code: 1 sign, 2 exponent and 1 mantissa bit (functional.get_4bit_type).
FP4 = torch.tensor([0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0]) / 12
TABLES = {"nf4": NF4, "fp4": FP4}


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
    values = table.index_select(0, codes.int())
    scale(values, scales, first=first, blocksize=blocksize)
    return values.add_(torch.tensor(offset, dtype=torch.float32, device=values.device))
