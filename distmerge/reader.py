"""What blocks are made from: stored tensors read and dequantized, factors loaded, through fixed buffers."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from distmerge.adapter.changes import ADD, LORA, Change
from distmerge.adapter.views import View
from distmerge.checkpoint.base import FileMark, check_mark
from distmerge.checkpoint.formats import Packing, Stored
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.layout import KEPT_STACKS, Task
from distmerge.numerics import nf4
from distmerge.numerics.apply import Loaded, as_rows, in_float64
from distmerge.numerics.combine import Combination, Delta, Part, deltas_of
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.lora import Factors
from distmerge.numerics.tuners import LOW_RANK, OPERATORS
from distmerge.plan import Plan
from distmerge.storage.files import open_input, read_exact

_MAX_OPEN = 64


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


class Reader:
    """Reads the tensors of `plan` from `base` and `adapters` (folders); several threads may use it at once, each with
    buffers of its own."""

    def __init__(self, plan: Plan, base: Path, adapters: tuple[Path, ...], device: torch.device) -> None:
        self._plan, self._folders, self._device = plan, (base, *adapters), device
        self._marks = {mark.name: mark for mark in plan.base_files}
        self._fds: dict[Path, int] = {}
        self._tables: dict[bytes, Tensor] = {}
        # A stack of experts is read once, not once for each of them.
        self._kept: dict[tuple[int, str, str], Tensor] = {}
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

    def read(self, spec: TensorSpec, offset: int, view: memoryview, *, origin: int = 0) -> None:
        """Fills `view` with the bytes of a tensor of the base, or of adapter number `origin`, from byte `offset` on."""
        path = self._folders[origin] / spec.file
        mark = self._marks[spec.file] if origin == 0 else None
        read_exact(self._fd(path, mark), view, spec.begin + offset, path)

    def read_dense(self, buffers: Buffers, stored: Stored, first: int, last: int, *, origin: int = 0) -> Tensor:
        """Elements [first, last) of `stored` in its dense dtype, on the device."""
        if stored.packing is None:
            size = ITEMSIZE[stored.data.dtype]
            self.read(stored.data, first * size, buffers.view[: (last - first) * size], origin=origin)
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

    def load_changes(self, task: Task, dtype: torch.dtype = torch.float32) -> tuple[Loaded, ...]:
        """The changes of `task` with their tensors on the device, floats as `dtype`."""
        loaded = tuple(self._load(change, dtype) for change in task.changes)
        self._settle()
        return loaded

    def read_deltas(
        self, buffers: Buffers, task: Task, first: int, last: int, parts: tuple[Part, ...]
    ) -> tuple[Delta, ...]:
        """What each adapter adds to the elements [first, last) of `task`, a block of it, computed as for the merge."""
        work = buffers.work[: last - first]
        if any(change.operator for part in parts for change in part.changes):
            work.copy_(self.read_dense(buffers, task.source, first, last, origin=task.origin))
        rows, top, left = as_rows(work, first, task.row_numel)
        return deltas_of(rows, parts, top=top, left=left)[0]

    def load_combination(self, task: Task) -> Combination:
        """Everything that is done to `task` with its tensors on the device; the thresholds are yet to be found."""
        return Combination(combine=self._plan.combine, name=task.twin or task.name, parts=self.load_parts(task))

    def load_parts(self, task: Task, dtype: torch.dtype = torch.float32) -> tuple[Part, ...]:
        """The changes of `task` by adapter folder, with their tensors on the device, floats as `dtype`; without their
        weights."""
        parts = []
        for number, changes in groupby(task.changes, key=lambda change: change.adapter):
            owner, adapters = self._plan.owners[number], self._plan.adapters
            parts.append(
                Part(
                    adapter=owner + 1,
                    weight=adapters[owner].weight,
                    sign=-1.0 if adapters[number].initial else 1.0,
                    changes=tuple(self._load(replace(change, weight=1.0), dtype) for change in changes),
                )
            )
        self._settle()
        return tuple(parts)

    def _load(self, change: Change, dtype: torch.dtype) -> Loaded:
        # Decompositions and factors that are computed lose digits on the way; they are small, or rare.
        exact = change.operator in LOW_RANK or _is_delicate(change)
        origin, wide = change.adapter + 1, torch.float64 if exact else dtype
        tensors = {role: self.load_view(view, origin, wide) for role, view in change.tensors.items()}
        factors = _factors(change, tensors, dtype)
        region = change.region
        operator = OPERATORS[change.operator] if factors is None else None
        if operator is not None:
            tensors = dict(operator.prepare(tensors, change.options))
        return Loaded(
            height=change.shape[1],
            matrices=region.matrices,
            rows=region.rows,
            cols=region.cols,
            factors=factors,
            operator=None if operator is None else in_float64(operator.apply) if exact else operator.apply,
            tensors=tensors if factors is None else {},
            options=change.options,
            weight=change.weight,
            transposed=change.transposed,
        )

    def load_view(self, view: View, origin: int, dtype: torch.dtype) -> Tensor:
        """The elements of `view` in its size, on the device; floats as `dtype`, integers as they are."""
        first, last = (0, view.spec.numel) if view.is_sparse else view.extent
        key = (origin, view.spec.file, view.spec.name)
        flat = self._kept.get(key) if view.is_sparse else None
        if flat is None:
            size = ITEMSIZE[view.spec.dtype]
            data = bytearray((last - first) * size)
            self.read(view.spec, first * size, memoryview(data), origin=origin)
            flat = torch.frombuffer(data, dtype=torch_dtype(view.spec.dtype)) if data else torch.empty(0)
            if view.is_sparse:
                self._kept = {**dict(list(self._kept.items())[1 - KEPT_STACKS :]), key: flat}
        part = flat.as_strided(view.size, view.stride, view.offset - first).contiguous().to(self._device)
        return part.to(dtype) if part.is_floating_point() else part

    def _fd(self, path: Path, mark: FileMark | None = None) -> int:
        with self._lock:
            if path not in self._fds:
                if mark is not None:
                    check_mark(path, mark)
                self._fds[path] = open_input(path)
            return self._fds[path]


def _is_delicate(change: Change) -> bool:
    """True for operators that float32 would rob of digits: decompositions, and orthogonalising what is nearly equal."""
    if change.operator in (LORA, ADD):
        return False
    return not OPERATORS[change.operator].row_local or bool(change.options.get("orthogonal"))


def _factors(change: Change, tensors: dict[str, Tensor], dtype: torch.dtype) -> Factors | None:
    """The factors, as `dtype`, of a change that is a product of two, transposed where the tensor is; None if it is
    none."""
    if change.operator == LORA:
        a, b = tensors["a"], tensors["b"]
        stacks = Factors(a=a, b=b.reshape(len(b), -1, b.shape[-1]), scaling=change.options["scaling"] * change.weight)
    elif change.operator == ADD:
        values = tensors["values"]
        scaling = change.options["scaling"] * change.weight
        return Factors(a=torch.ones_like(values[:1]).view(1, 1, 1), b=values.view(1, -1, 1), scaling=scaling)
    elif change.operator in LOW_RANK:
        b, a = LOW_RANK[change.operator](tensors, change.options)
        stacks = Factors(a=a[None].to(dtype), b=b[None].to(dtype), scaling=change.weight)
    else:
        return None
    return stacks.transpose() if change.transposed else stacks


def host_pair(nbytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`nbytes` bytes on the device, and their pinned twin on the host; on the CPU the same tensor twice."""
    tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return tensor, tensor if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def view_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the host; valid as long as the tensor lives."""
    return memoryview((ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())).cast("B")
