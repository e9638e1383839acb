"""What blocks are made from: stored tensors read and dequantized, factors loaded, through fixed buffers."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distmerge.adapter.peft_adapter import WEIGHTS
from distmerge.checkpoint.base import FileMark, check_mark
from distmerge.checkpoint.formats import Packing, Stored
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.layout import BLOCK_NUMEL, Task
from distmerge.numerics import nf4
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.lora import Factors
from distmerge.plan import Plan
from distmerge.storage.files import open_input, read_exact

_MAX_OPEN = 64


class Buffers:
    """Room for one block on its way in: as stored, as codes, and in float32; on an accelerator with a pinned copy of
    the first on the host."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        stored = max(task.stored_block_nbytes for task in plan.tasks)
        packed = any(task.source.packing for task in plan.tasks)
        self.stored, self.host = host_pair(stored, device)
        self.view = view_of(self.host)
        self.work = torch.empty(BLOCK_NUMEL + 2, dtype=torch.float32, device=device)
        self.dense = torch.empty(4 * BLOCK_NUMEL * packed, dtype=torch.uint8, device=device)
        self.index = torch.empty((BLOCK_NUMEL // 2 + 1) * packed, dtype=torch.int32, device=device)

    def upload(self, nbytes: int) -> Tensor:
        """The first `nbytes` of what was read, on the device."""
        if self.stored is not self.host:
            self.stored[:nbytes].copy_(self.host[:nbytes], non_blocking=True)
        return self.stored[:nbytes]


class Reader:
    """Reads the tensors of `plan` from `base` and `adapters` (folders); several threads may use it at once, each with
    buffers of its own."""

    def __init__(self, plan: Plan, base: Path, adapters: tuple[Path, ...], device: torch.device) -> None:
        self._plan, self._base, self._adapters, self._device = plan, base, adapters, device
        self._marks = {mark.name: mark for mark in plan.base_files}
        self._fds: dict[Path, int] = {}
        self._tables: dict[bytes, Tensor] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes every file."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def trim(self) -> None:
        """Closes the files if many are open. Only while no thread reads."""
        if len(self._fds) > _MAX_OPEN:
            self.close()

    def buffers(self) -> Buffers:
        """Buffers that fit every block of the plan."""
        return Buffers(self._plan, self._device)

    def read(self, spec: TensorSpec, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes of a base tensor from its byte `offset` on."""
        path = self._base / spec.file
        read_exact(self._fd(path, self._marks[spec.file]), view, spec.begin + offset, path)

    def read_dense(self, buffers: Buffers, stored: Stored, first: int, last: int) -> Tensor:
        """Elements [first, last) of `stored` in its dense dtype, on the device."""
        if stored.packing is None:
            size = ITEMSIZE[stored.data.dtype]
            self.read(stored.data, first * size, buffers.view[: (last - first) * size])
            return buffers.upload((last - first) * size).view(torch_dtype(stored.data.dtype))
        odd, nbytes = first % 2, -(-last // 2) - first // 2
        self.read(stored.data, first // 2, buffers.view[:nbytes])
        table = self._table(stored.packing.quant_map, nf4.pair_table)
        nf4.unpack(buffers.upload(nbytes), table, buffers.index[:nbytes], buffers.work[: 2 * nbytes])
        values = buffers.work[odd : odd + last - first]
        absmax = self._absmax(stored.packing, first, last)
        nf4.scale(values, absmax, first=first, blocksize=stored.packing.blocksize)
        dense = buffers.dense.view(torch_dtype(stored.dtype))[: last - first]
        return dense.copy_(values)

    def _absmax(self, packing: Packing, first: int, last: int) -> Tensor:
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
        self.read(spec, begin * size, memoryview(data))
        return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).to(self._device)

    def _table(self, spec: TensorSpec, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make` of a code table; nearly every tensor holds the same one, so that it is made once."""
        data = bytearray(spec.nbytes)
        self.read(spec, 0, memoryview(data))
        key = bytes(data)
        if key not in self._tables:
            table = make(torch.frombuffer(data, dtype=torch.float32).to(self._device))
            self._settle()
            self._tables[key] = table
        return self._tables[key]

    def _settle(self) -> None:
        """Waits for the accelerator: what one stream made, the lanes' other streams are about to use."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def load_factors(self, task: Task) -> tuple[Factors, ...]:
        """The factors of every delta of `task`, in float32 on the device."""
        factors = tuple(
            Factors(
                a=self._factor(delta.a, self._adapters[delta.adapter]),
                b=self._factor(delta.b, self._adapters[delta.adapter]),
                scaling=delta.scaling,
            )
            for delta in task.deltas
        )
        self._settle()
        return factors

    def _factor(self, spec: TensorSpec, folder: Path) -> Tensor:
        data = bytearray(spec.nbytes)
        read_exact(self._fd(folder / WEIGHTS), memoryview(data), spec.begin, folder / WEIGHTS)
        stored = torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).view(spec.shape)
        return stored.to(self._device).float()

    def _fd(self, path: Path, mark: FileMark | None = None) -> int:
        with self._lock:
            if path not in self._fds:
                if mark is not None:
                    check_mark(path, mark)
                self._fds[path] = open_input(path)
            return self._fds[path]


def host_pair(nbytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`nbytes` bytes on the device, and their pinned twin on the host; on the CPU the same tensor twice."""
    tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return tensor, tensor if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def view_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the host; valid as long as the tensor lives."""
    return memoryview((ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())).cast("B")
