"""The door to the package's compiled arithmetic, which is there where a C compiler was at installation."""

from __future__ import annotations

import ctypes
import hashlib
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PANEL = 32
"""Columns of a factor that its panels hold together, for all r."""
LARGEST_R = 256
"""Factors of a larger inner dimension are left to torch, whose products are cut to fit the caches."""

_PARTS = ("block.h", "codes.h", "kernels.c", "level.h")
_LIBRARY = __file__.removesuffix("compiled.py") + "libkernels.so"  # hatch_build.py puts it there
_SOURCES = [__file__.removesuffix("compiled.py") + f"kernels/{name}" for name in _PARTS]
_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_MERGE_TYPES = (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _INT, ctypes.c_float, _POINTER)
_MEASURE_TYPES = (_POINTER, _POINTER, _POINTER, _INT, _POINTER)
_UNPACK_TYPES = (_POINTER, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What is added to a block: `scaling * b @ a`, float32 on the CPU; `b` (rows, r) and `panels` (n, r, PANEL), of
    which number i is columns `PANEL * i` and following of a, with zeros beyond its last one."""

    b: Tensor
    panels: Tensor
    scaling: float


def arithmetic(device: str) -> str:
    """What computes on devices of that type, `compiled` code or `torch`: last digits depend on it."""
    return "torch" if device != "cpu" or not _levels() else "compiled"


def panels_of(a: Tensor) -> Tensor | None:
    """The panels of matrices `a` (n, r, cols), (n, columns of PANEL, r, PANEL); None where products are torch's."""
    n, r, cols = a.shape
    if a.device.type != "cpu" or a.dtype != torch.float32 or not a.numel() or r > LARGEST_R or not _levels():
        return None
    width = -(-cols // PANEL) * PANEL
    padded = a if width == cols else torch.nn.functional.pad(a, (0, width - cols))
    return padded.reshape(n, r, -1, PANEL).transpose(1, 2).contiguous()


def add_product(work: Tensor, product: Product) -> None:
    """Adds `product` to `work` (rows, cols), float32, in place; each row is contiguous."""
    if work.dtype != torch.float32:
        raise ValueError(f"a product is added to {work.dtype}")
    _merge(work, product, work, None)


def merge_block(base: Tensor, product: Product, out: Tensor, *, work: Tensor | None = None) -> list[float] | None:
    """Rounds `base + product` to `out`, both (rows, cols) and contiguous, and returns the sums of `measure_block`.

    The bits are those of `add_product` in float32 and one rounding, of a block of any shape. `work`, float32 and of the
    same shape, gets the values before they are rounded. None where it is not compiled for their dtypes.
    """
    if not _levels() or base.dtype not in _NAMES or out.dtype not in _NAMES or base.device.type != "cpu":
        return None
    return _merge(base, product, out, work)


def measure_block(base: Tensor, work: Tensor, out: Tensor) -> list[float] | None:
    """Sums of W^2, D^2, A^2 and D A, the count of A = 0 and the largest |D|, where W = `base`, D = `work` - W and A =
    `out` - W, of flat tensors on the CPU, `work` float32; None where it is not compiled for their dtypes."""
    if not _levels() or base.dtype not in _NAMES or out.dtype not in _NAMES or base.device.type != "cpu":
        return None
    if not len(base) == len(work) == len(out) or work.dtype != torch.float32:
        raise ValueError(f"blocks of {len(base)}, {len(work)} and {len(out)} elements, {work.dtype}")
    found = (ctypes.c_double * 6)()
    blocks = [one.contiguous() for one in (base, work, out)]
    _function("measure", base.dtype, out.dtype)(*(one.data_ptr() for one in blocks), len(work), found)
    return list(found)


def unpack_codes(codes: Tensor, table: Tensor, scales: Tensor, out: Tensor, *, first: int, blocksize: int) -> bool:
    """Writes elements `first` and following of a 4-bit tensor to `out`, flat: the bits of `nf4.unpack` and `nf4.scale`,
    rounded once to the dtype of `out`.

    `codes`, uint8, begins with the byte and `scales`, float32, with the scale of element `first`; `table` is
    `nf4.pair_table`'s. False, and `out` is as it was, where it is not compiled for that, or a value is not finite.
    """
    if not _levels() or out.dtype not in _NAMES or out.device.type != "cpu":
        return False
    skipped, into = first % 2, first % blocksize
    if (len(codes), len(scales)) != (-(-(skipped + len(out)) // 2), -(-(into + len(out)) // blocksize)):
        raise ValueError(f"{len(codes)} bytes and {len(scales)} scales for {len(out)} elements from {first} on")
    types = (codes.dtype, table.dtype, scales.dtype, table.shape)
    flat = all(each.is_contiguous() for each in (codes, table, scales, out))
    if types != (torch.uint8, torch.int64, torch.float32, (256,)) or not flat:
        raise ValueError(f"codes, table and scales are {types}")
    if not all(math.isfinite(each.sum().item()) for each in (scales, table.view(torch.float32))):
        return False  # kernels need not keep what is not a number; a sum is no number where a term is none
    _function("unpack", out.dtype)(
        codes.data_ptr(),
        skipped,
        len(out),
        table.data_ptr(),
        scales.data_ptr(),
        blocksize - into,
        blocksize,
        out.data_ptr(),
    )
    return True


def _merge(base: Tensor, product: Product, out: Tensor, work: Tensor | None) -> list[float]:
    (rows, cols), (n, r, width) = base.shape, product.panels.shape
    laid = [each for each in (base, out, work) if each is not None]
    strides = {each.stride(0) if rows > 1 else cols for each in laid}
    if len(strides) > 1 or any(each.shape != base.shape or (cols > 1 and each.stride(1) != 1) for each in laid):
        raise ValueError("blocks of different shapes, or not in rows")
    fits = r > 0 and product.b.shape == (rows, r) and width == PANEL and n * PANEL >= cols
    plain = all(each.is_contiguous() and each.dtype == torch.float32 for each in (product.b, product.panels))
    if not fits or not plain:
        raise ValueError(f"b {tuple(product.b.shape)} and {n} panels of r {r} do not fit ({rows}, {cols})")
    found = (ctypes.c_double * 6)()
    _function("merge", base.dtype, out.dtype)(
        base.data_ptr(),
        out.data_ptr(),
        None if work is None else work.data_ptr(),
        rows,
        cols,
        *strides,
        product.b.data_ptr(),
        product.panels.data_ptr(),
        r,
        product.scaling,
        found,
    )
    return list(found)


@cache
def _function(kind: str, *dtypes: torch.dtype) -> ctypes._NamedFuncPointer:
    name = "_".join((kind, *(_NAMES[dtype] for dtype in dtypes), _levels()[0]))
    return getattr(_library(), name)  # type: ignore[no-any-return]


@cache
def _levels() -> tuple[str, ...]:
    """The levels of instructions that are compiled and that this machine has, best first."""
    library = _library()
    return () if library is None else tuple(library.levels().decode().split())


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.source.restype = library.levels.restype = ctypes.c_char_p
        if library.source().decode() != _digest():
            return None
        for level in library.levels().decode().split():
            for out in _NAMES.values():
                names: dict[str, tuple[type, ...]] = {f"unpack_{out}_{level}": _UNPACK_TYPES}
                for base in _NAMES.values():
                    names[f"merge_{base}_{out}_{level}"] = _MERGE_TYPES
                    names[f"measure_{base}_{out}_{level}"] = _MEASURE_TYPES
                for name, types in names.items():
                    getattr(library, name).argtypes, getattr(library, name).restype = types, None
    except (OSError, AttributeError):  # not built, or for another machine
        return None
    return library


def _digest() -> str:
    """What a library tells that was compiled from the sources beside it, and not from older ones. Raises OSError."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        with open(name, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()
