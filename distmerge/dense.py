"""Stored tensors as floats: a range of elements read through fixed buffers and dequantized on the device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.checkpoint.packing import FourBit, Stored
from distmerge.numerics import nf4
from distmerge.numerics.dtypes import torch_dtype
from distmerge.plan import Plan


class Read(Protocol):
    """Fills `view` with the bytes of a tensor of the base, or of adapter number `origin`, from byte `offset` on."""

    def __call__(self, spec: TensorSpec, offset: int, view: memoryview, *, origin: int = 0) -> None: ...


class Buffers:
    """Room for one block on its way in: as stored, as codes, and in float32; on an accelerator with a pinned copy of
    the first on the host."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        stored = max(task.stored_block_nbytes for task in plan.tasks)
        packed = max((task.largest_block_numel for task in plan.tasks if task.source.packing), default=0)
        self.stored, self.host = host_pair(stored, device)
        self.view = view_of(self.host)
        self.work = torch.empty(plan.block_numel + 2, dtype=torch.float32, device=device)
        self.dense = torch.empty(4 * packed, dtype=torch.uint8, device=device)
        self.index = torch.empty(packed and packed // 2 + 1, dtype=torch.int32, device=device)

    def upload(self, nbytes: int) -> Tensor:
        """The first `nbytes` of what was read, on the device."""
        if self.stored is not self.host:
            self.stored[:nbytes].copy_(self.host[:nbytes], non_blocking=True)
        return self.stored[:nbytes]


class Dense:
    """Dequantizes what `read` gives, on `device`; several threads may use it, each with buffers of its own."""

    def __init__(self, read: Read, device: torch.device) -> None:
        self._read, self._device = read, device
        self._tables: dict[bytes, Tensor] = {}

    def read(self, buffers: Buffers, stored: Stored, first: int, last: int, *, origin: int = 0) -> Tensor:
        """Elements [first, last) of `stored` in its dense dtype, on the device."""
        if stored.packing is None:
            size = ITEMSIZE[stored.data.dtype]
            self._read(stored.data, first * size, buffers.view[: (last - first) * size], origin=origin)
            return buffers.upload((last - first) * size).view(torch_dtype(stored.data.dtype))
        return self._four_bit(buffers, stored.data, stored.packing, first, last)

    def _four_bit(self, buffers: Buffers, data: TensorSpec, packing: FourBit, first: int, last: int) -> Tensor:
        odd, nbytes = first % 2, -(-last // 2) - first // 2
        self._read(data, first // 2, buffers.view[:nbytes])
        table = self._table(packing.quant_map, nf4.pair_table)
        nf4.unpack(buffers.upload(nbytes), table, buffers.index[:nbytes], buffers.work[: 2 * nbytes])
        values = buffers.work[odd : odd + last - first]
        absmax = self._absmax(packing, first, last)
        nf4.scale(values, absmax, first=first, blocksize=packing.blocksize)
        dense = buffers.dense.view(torch_dtype(packing.dtype))[: last - first]
        return dense.copy_(values)

    def _absmax(self, packing: FourBit, first: int, last: int) -> Tensor:
        """The float32 scales of the blocks that hold elements [first, last), from the file."""
        begin, end = first // packing.blocksize, (last - 1) // packing.blocksize + 1
        if packing.nested_absmax is not None and packing.nested_quant_map is not None:
            size = packing.nested_blocksize
            codes = self._items(packing.absmax, begin, end)
            scales = self._items(packing.nested_absmax, begin // size, (end - 1) // size + 1)
            table = self._table(packing.nested_quant_map, lambda quant_map: quant_map)
            return nf4.nested_absmax(codes, table, scales, first=begin, blocksize=size, offset=packing.nested_offset)
        if len(packing.absmax.shape) == 1:
            return self._items(packing.absmax, begin, end).float()
        # Written as (in / blocksize, out): each of the tensor's rows is a column there.
        per_row, rows = packing.absmax.shape
        top, bottom = begin // per_row, (end - 1) // per_row + 1
        columns = [self._items(packing.absmax, k * rows + top, k * rows + bottom) for k in range(per_row)]
        return torch.stack(columns, dim=1).float().view(-1)[begin - top * per_row : end - top * per_row]

    def _items(self, spec: TensorSpec, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a small tensor, on the device."""
        size = ITEMSIZE[spec.dtype]
        data = bytearray((end - begin) * size)
        self._read(spec, begin * size, memoryview(data))
        return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).to(self._device)

    def _table(self, spec: TensorSpec, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make` of a code table; nearly every tensor holds the same one, so that it is made once."""
        data = bytearray(spec.nbytes)
        self._read(spec, 0, memoryview(data))
        key = bytes(data)
        if key not in self._tables:
            table = make(torch.frombuffer(data, dtype=torch.float32).to(self._device))
            settle(self._device)
            self._tables[key] = table
        return self._tables[key]


def settle(device: torch.device) -> None:
    """Waits for the accelerator: what one stream made, the lanes' other streams are about to use."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def host_pair(nbytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`nbytes` bytes on the device, and their pinned twin on the host; on the CPU the same tensor twice."""
    tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return tensor, tensor if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def view_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the host; valid as long as the tensor lives."""
    return memoryview((ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())).cast("B")
