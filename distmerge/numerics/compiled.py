"""The door to the package's compiled arithmetic, which is there where a C compiler was at installation."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

_LIBRARY = __file__.removesuffix("compiled.py") + "libsums.so"  # hatch_build.py puts it there
_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def arithmetic(device: str) -> str:
    """What takes the sums on devices of that type, `compiled` code or `torch`: their last digits depend on it, no
    weight does."""
    return "torch" if device != "cpu" or _library() is None else "compiled"


def sums_of_block(base: Tensor, work: Tensor, out: Tensor) -> list[float] | None:
    """Sums of W^2, D^2, A^2 and D A, the count of A = 0 and the largest |D|, where W = `base`, D = `work` - W and A =
    `out` - W, of contiguous tensors on the CPU, `work` float32; None where it is not compiled for their dtypes."""
    library = _library()
    known = base.dtype in _NAMES and out.dtype in _NAMES and base.device.type == "cpu"
    if library is None or not known:
        return None
    if not len(base) == len(work) == len(out) or work.dtype != torch.float32:
        raise ValueError(f"blocks of {len(base)}, {len(work)} and {len(out)} elements, {work.dtype}")
    found = (ctypes.c_double * 6)()
    measure = getattr(library, f"measure_{_NAMES[base.dtype]}_{_NAMES[out.dtype]}")
    blocks = [one.contiguous() for one in (base, work, out)]
    measure(*(ctypes.c_void_p(one.data_ptr()) for one in blocks), ctypes.c_int64(len(work)), found)
    return list(found)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
        for base in _NAMES.values():
            for out in _NAMES.values():
                getattr(library, f"measure_{base}_{out}").restype = None
    except (OSError, AttributeError):  # not built, for another machine, or from an older source
        return None
    return library
