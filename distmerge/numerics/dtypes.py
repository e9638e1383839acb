"""The names that safetensors gives to dtypes, as torch's."""

from __future__ import annotations

import torch

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype that bases and adapters may have. Raises KeyError for any other."""
    return _TORCH[name]
