"""Packed values against the merged ones: the nearest code passes, any other does not."""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor

from distmerge.numerics import nf4, packing4
from distmerge.numerics.packed_distance import Grid, nested_slack, off_grid, off_scale

SHAPE = (40, 136)


def packed(kind: str, dtype: torch.dtype, *, double: bool, seed: int = 0) -> tuple[Tensor, Tensor, Grid]:
    """The merged values in float64, what bitsandbytes' packing of their rounded form is read as, and its grid."""
    exact = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.03
    codes, state = bitsandbytes.functional.quantize_4bit(exact.to(dtype), quant_type=kind, compress_statistics=double)
    quant_map = nf4.NF4 if kind == "nf4" else nf4.FP4
    if double:
        nested = packing4.Nested(codes=state.absmax, absmax=state.state2.absmax, offset=float(state.offset))
        scales = packing4.unnest(nested)
        slack = nested_slack(nested.absmax, len(scales))
    else:
        scales, slack = state.absmax, torch.zeros_like(state.absmax)
    flat = codes.view(-1)
    values = quant_map[torch.stack([flat >> 4, flat & 15], 1).view(-1).int()][: exact.numel()]
    nf4.scale(values, scales, first=0, blocksize=64)
    return exact.view(-1), values.to(dtype), Grid(scales=scales, slack=slack, quant_map=quant_map, blocksize=64)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_packs_is_on_the_grid(kind: str, dtype: torch.dtype, *, double: bool) -> None:
    for seed in range(4):
        exact, stored, grid = packed(kind, dtype, double=double, seed=seed)
        noise = exact.abs() * 2**-24
        assert not off_grid(stored, exact, noise, grid).any()
        assert not off_scale(grid.scales, exact, noise, grid.slack, blocksize=64, dtype=dtype).any()


@pytest.mark.parametrize("double", [True, False])
def test_a_code_that_is_not_the_nearest_is_found(*, double: bool) -> None:
    exact, stored, grid = packed("nf4", torch.bfloat16, double=double)
    scale = float(grid.scales[1])
    wrong = stored.clone()
    here = int((exact[64:128].abs() < 0.05 * scale).nonzero()[0]) + 64
    wrong[here] = 0.25 * scale
    assert off_grid(wrong, exact, exact.abs() * 2**-24, grid).nonzero().tolist() == [[here]]


@pytest.mark.parametrize("factor", [0.9, 1.1, -1.0, 2.0])
def test_a_scale_that_is_not_the_largest_magnitude_is_found(factor: float) -> None:
    exact, _, grid = packed("nf4", torch.bfloat16, double=True)
    scales = grid.scales.clone()
    scales[3] *= factor
    found = off_scale(scales, exact, exact.abs() * 2**-24, grid.slack, blocksize=64, dtype=torch.bfloat16)
    assert found.nonzero().tolist() == [[3]]


@pytest.mark.parametrize("double", [True, False])
def test_a_small_delta_that_was_left_out_shows_in_many_elements(*, double: bool) -> None:
    exact, stored, grid = packed("nf4", torch.bfloat16, double=double)
    delta = torch.randn(exact.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.003
    assert off_grid(stored, exact + delta, exact.abs() * 2**-24, grid).double().mean() > 0.05


def test_no_scale_that_double_quantization_stores_is_farther_off_than_its_slack() -> None:
    for seed in range(8):
        absmax = torch.rand(1 << 17, generator=torch.Generator().manual_seed(seed)).pow(1 + seed % 3) + 1e-3
        nested = packing4.nest(absmax)
        off = (packing4.unnest(nested) - absmax).abs()
        assert bool((off <= nested_slack(nested.absmax, len(absmax))).all())
