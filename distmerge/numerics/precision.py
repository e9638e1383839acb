"""The settings of torch under which a float32 product is one: no TF32, no sums in 16 bits, no borrowed defaults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Flags of torch.backends.cuda.matmul that let sums lose digits.
_LOSSY = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def full_precision(*, num_threads: int | None = None) -> Iterator[None]:
    """In the body, products of float32 are computed in float32 on every device, and torch's defaults are its own.

    Off are TF32 for matrix products (cuBLAS, oneDNN) and convolutions (cuDNN), sums of 16-bit products in 16 bits, and
    a default dtype that the program has chosen. With `num_threads` that many threads work inside one operation. All of
    it is the whole process's state, so that it holds for every lane, and is put back afterwards.
    """
    before = _settings()
    torch.set_float32_matmul_precision("highest")
    for holder in _holders():
        holder.fp32_precision = "ieee"
    for flag in _LOSSY:
        if hasattr(torch.backends.cuda.matmul, flag):
            setattr(torch.backends.cuda.matmul, flag, False)
    torch.set_default_dtype(torch.float32)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        _restore(before)


def _holders() -> list[Any]:
    """Where torch 2.9 and newer keep the precision of float32 by backend and kind of operation."""
    backends: Any = torch.backends
    found = [backends.cuda.matmul, backends.mkldnn.matmul if hasattr(backends.mkldnn, "matmul") else None]
    found.append(backends.cudnn.conv if hasattr(backends.cudnn, "conv") else None)
    return [holder for holder in found if holder is not None and hasattr(holder, "fp32_precision")]


def _settings() -> dict[str, Any]:
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set it by backend, and torch then refuses to say it for all
        matmul = None
    return {
        "matmul": matmul,
        "held": [holder.fp32_precision for holder in _holders()],
        "lossy": {flag: getattr(torch.backends.cuda.matmul, flag, None) for flag in _LOSSY},
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def _restore(before: dict[str, Any]) -> None:
    if before["matmul"] is not None:
        torch.set_float32_matmul_precision(before["matmul"])
    for holder, held in zip(_holders(), before["held"], strict=True):
        if holder.fp32_precision != held:
            holder.fp32_precision = held
    for flag, value in before["lossy"].items():
        if value is not None:
            setattr(torch.backends.cuda.matmul, flag, value)
    torch.set_default_dtype(before["dtype"])
    torch.set_num_threads(before["threads"])
