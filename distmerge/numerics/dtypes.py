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
    "U8": torch.uint8,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype that bases and adapters may have. Raises KeyError for any other."""
    return _TORCH[name]
