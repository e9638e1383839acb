"""Floats to 8-bit integers: bitsandbytes' own bytes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from distmerge.numerics.packing8 import pack_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (300, 1001)], ids=str)
def test_rows_get_the_codes_and_scales_that_bitsandbytes_gives(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for scale in (0.05, 30.0, 1e-7):
        values = (torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * scale).to(dtype)
        codes, scales, _ = functional.int8_vectorwise_quant(values.to(torch.float16))
        found = pack_rows(values)
        assert torch.equal(found[0][scales > 0], codes[scales > 0])
        assert torch.equal(found[1], scales)


def test_rows_that_linear8bitlt_packs_are_packed_alike() -> None:
    from bitsandbytes.nn import Int8Params

    values = torch.randn(40, 72, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.03
    packed = Int8Params(values.clone(), requires_grad=False, has_fp16_weights=False)
    packed = packed.to("cpu") if packed.data.dtype == torch.int8 else packed._quantize("cpu")
    codes, scales = pack_rows(values)
    assert torch.equal(packed.CB if packed.CB is not None else packed.data, codes)
    assert torch.equal(packed.SCB, scales)


def test_a_row_of_zeros_gets_codes_of_zero_and_empty_rows_get_none() -> None:
    values = torch.zeros(3, 5)
    values[1] = 2.0
    codes, scales = pack_rows(values)
    assert codes.tolist() == [[0] * 5, [127] * 5, [0] * 5]
    assert scales.tolist() == [0.0, 2.0, 0.0]
    codes, scales = pack_rows(torch.empty(3, 0))
    assert codes.shape == (3, 0)
    assert scales.tolist() == [0.0] * 3
