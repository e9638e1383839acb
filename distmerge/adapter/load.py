"""Small tensors of adapters, read while planning."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from distmerge.adapter.views import View
from distmerge.checkpoint.header import ITEMSIZE
from distmerge.numerics.dtypes import torch_dtype
from distmerge.storage.files import open_input, read_exact


def read_view(folder: Path, view: View) -> Tensor:
    """The elements of `view` in its size and dtype, from its file in `folder`."""
    first, last = view.extent
    size = ITEMSIZE[view.spec.dtype]
    data = bytearray((last - first) * size)
    path = folder / view.spec.file
    fd = open_input(path)
    try:
        read_exact(fd, memoryview(data), view.spec.begin + first * size, path)
    finally:
        os.close(fd)
    if not data:
        return torch.empty(view.size, dtype=torch_dtype(view.spec.dtype))
    return torch.frombuffer(data, dtype=torch_dtype(view.spec.dtype)).as_strided(view.size, view.stride, 0)
