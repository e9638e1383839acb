"""Plain tensors read as what bitsandbytes makes of them in 4 bits, and the scales of whole tensors that this takes.

Double quantization takes the mean of all scales of a tensor off, so that the tensor is gone through once before its
first element is known.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from distmerge.checkpoint.packing import ROUNDED_NUMEL, Simulated
from distmerge.errors import VerifyError
from distmerge.numerics import nf4, packing4
from distmerge.numerics.dtypes import torch_dtype


class Rounding:
    """Rounds plain values through 4 bits on `device`; several threads may use it.

    It keeps the scales of the tensors that were asked for last, as many as fit `limit_nbytes`, and of one in any case.
    """

    def __init__(self, device: torch.device, limit_nbytes: int) -> None:
        self._limit = limit_nbytes
        self._tables = {kind: table.to(device) for kind, table in nf4.TABLES.items()}
        self._map = packing4.dynamic_map().to(device)
        self._nested: dict[str, tuple[packing4.Nested, int]] = {}
        self._lock = threading.Lock()

    def learn(self, name: str, packing: Simulated, absmax: Tensor) -> packing4.Nested:
        """Keeps what double quantization makes of `absmax`, the scales of all blocks of the tensor `name`."""
        nested = packing4.nest(absmax)
        with self._lock:
            self._nested[name] = nested, packing.kept_nbytes
            while len(self._nested) > 1 and sum(nbytes for _, nbytes in self._nested.values()) > self._limit:
                del self._nested[next(iter(self._nested))]
        return nested

    def kept(self, name: str) -> packing4.Nested | None:
        """What was learnt of the tensor `name`, if it is still kept."""
        with self._lock:
            if (found := self._nested.pop(name, None)) is None:
                return None
            self._nested[name] = found  # used last, forgotten last
        return found[0]

    def scales(self, name: str, packing: Simulated, plain: Tensor) -> Tensor:
        """The largest magnitudes, float32, of the blocks that `plain` is made of: elements in their own order, or a
        whole matrix. Raises VerifyError where one is not finite."""
        absmax = packing4.block_absmax(_as_packed(packing, plain), packing.blocksize)
        if not torch.isfinite(absmax).all():
            raise VerifyError("the base holds values that are not finite, which have no 4-bit form", where=name)
        return absmax

    def round(
        self, name: str, packing: Simulated, plain: Tensor, *, begin: int, nested: packing4.Nested | None
    ) -> Tensor:
        """The elements `plain`, whole blocks from element `begin` on, rounded, in their own dtype."""
        size, values = packing.blocksize, _as_packed(packing, plain)
        absmax = self.scales(name, packing, plain)
        read = absmax if nested is None else self._read(nested, begin // size, len(absmax))
        rounded = torch.empty_like(values)
        step = max(ROUNDED_NUMEL // size, 1) * size
        for first in range(0, len(values), step):
            part = slice(first, first + step)
            blocks = slice(first // size, (first + step) // size)
            rounded[part] = self._through(packing, values[part], absmax[blocks], read[blocks], begin + first)
        if not packing.transposed:
            return rounded
        rows, cols = packing.shape
        return rounded.view(cols, rows).T.contiguous().view(-1)

    def _through(self, packing: Simulated, values: Tensor, absmax: Tensor, read: Tensor, first: int) -> Tensor:
        """Some whole blocks of the tensor, from element `first` on, rounded."""
        sizes = {"first": first, "blocksize": packing.blocksize, "numel": packing.numel}
        unpacked = packing4.through(values, absmax, read, self._tables[packing.kind], **sizes)
        return unpacked.to(values.dtype).to(torch_dtype(packing.compute_dtype))

    def _read(self, nested: packing4.Nested, first: int, count: int) -> Tensor:
        """The scales of blocks [first, first + count), as they are read back."""
        size = packing4.NESTED_BLOCKSIZE
        scales = nested.absmax[first // size :]
        codes = nested.codes[first : first + count]
        return nf4.nested_absmax(codes, self._map, scales, first=first, blocksize=size, offset=nested.offset)


def _as_packed(packing: Simulated, plain: Tensor) -> Tensor:
    """`plain` in the order in which it is packed."""
    return plain.view(packing.shape).T.contiguous().view(-1) if packing.transposed else plain
