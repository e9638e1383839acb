"""Floats to 8-bit integers with one scale for each row, as bitsandbytes packs Linear8bitLt on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """The codes, int8 (out, in), and scales, float32 (out,), of a weight: unpacked it is `code * scale / 127`.

    `values` is float (out, in). bitsandbytes casts it to float16 first (nn.Int8Params), then takes the largest
    magnitude of each row as its scale (backends/default/ops.py, int8_vectorwise_quant); a row of zeros gets codes of 0.
    """
    halves = values.to(torch.float16)
    scales = halves.abs().amax(1).float() if values.shape[1] else torch.zeros(len(values), device=values.device)
    codes = torch.round(halves * (127.0 / scales[:, None])).nan_to_num_(nan=0.0)
    return codes.to(torch.int8), scales
