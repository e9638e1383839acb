"""Packed values held against what they should be: each must be the nearest that its code could have given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.numerics import nf4, packing4
from distmerge.numerics.rounding import ulp

# Half the widest step of the 8-bit scales, as a share of the largest of their block of 256; and what bitsandbytes' CPU
# code may be off beyond it, which looks them up in a table of 65536 steps.
_NESTED_STEP = 0.9 / 64 / 2 + 1 / 65535 + 2**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values that a block's codes can give: `scales` as they are read, float32 (n,) of the blocks from the first
    on, times `quant_map`, float32 (16,). `slack` (n,) says how far the scales by which the codes were chosen may lie
    from those, 0 where they were chosen by them."""

    scales: Tensor
    slack: Tensor
    quant_map: Tensor
    blocksize: int


def nested_slack(nested_absmax: Tensor, num_blocks: int, *, blocksize: int = packing4.NESTED_BLOCKSIZE) -> Tensor:
    """How far scales that are stored in 8 bits, under `nested_absmax` (float32), may lie from what they were."""
    return (nested_absmax * _NESTED_STEP).repeat_interleave(blocksize)[:num_blocks]


def allowed(stored: Tensor, oracle: Tensor, noise: Tensor, grid: Grid) -> Tensor:
    """How far each of `stored`, as a loader reads them, may lie from `oracle` if it is the value of `grid` nearest to
    it; float64 (n,).

    `oracle` and `noise` are float64: the exact merged values, and the most that float32 arithmetic may have moved
    them before they were rounded to the dtype of `stored` and packed. All begin with a block.
    """
    scaled = oracle.clone()
    inverse = torch.where(grid.scales == 0, torch.zeros_like(grid.scales), 1 / grid.scales).double()
    nf4.scale(scaled, inverse, first=0, blocksize=grid.blocksize)
    best = grid.quant_map.double()[packing4.nearest(scaled.float(), grid.quant_map).int()]
    nf4.scale(best, grid.scales.double(), first=0, blocksize=grid.blocksize)
    slack = grid.slack.double().repeat_interleave(grid.blocksize)[: len(oracle)]
    moved = noise + ulp(oracle, stored.dtype) / 2 + slack
    return (best - oracle).abs() + 2 * moved + ulp(stored.double(), stored.dtype)


def off_grid(stored: Tensor, oracle: Tensor, noise: Tensor, grid: Grid) -> Tensor:
    """Which elements of `stored` lie farther from `oracle` than is `allowed`; bool (n,)."""
    return ~((stored.double() - oracle).abs() <= allowed(stored, oracle, noise, grid))


def off_scale(
    scales: Tensor, oracle: Tensor, noise: Tensor, slack: Tensor, *, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """Which `scales`, float32 (n,), are not the largest magnitude of their block of `oracle`, as packing without a
    search gives them; bool (n,)."""
    expected = packing4.block_absmax(oracle, blocksize).double()
    room = packing4.block_absmax(noise + ulp(oracle, dtype) / 2, blocksize).double() + slack.double()
    return ~((scales.double() - expected).abs() <= room + expected * 2**-22)


def plain_error(oracle: Tensor, dtype: torch.dtype, quant_map: Tensor, blocksize: int) -> float:
    """The squared error of `oracle`, float64, when it is rounded to `dtype` and packed with its largest magnitudes as
    scales, read back in `dtype`. It begins with a block, and ends with one or with its tensor."""
    values = oracle.to(dtype)
    absmax = packing4.block_absmax(values, blocksize)
    sizes = {"first": 0, "blocksize": blocksize}
    codes = packing4.codes(values, absmax, quant_map, numel=len(values), **sizes)
    read = packing4.unpacked(codes, absmax, quant_map, **sizes).to(dtype)
    return float((read.double() - oracle).square().sum())
