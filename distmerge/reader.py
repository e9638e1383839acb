"""What blocks are made from: stored tensors read and dequantized, factors loaded, through fixed buffers."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from distmerge.adapter.changes import ADD, LORA, Change
from distmerge.adapter.views import View
from distmerge.checkpoint.base import check_mark
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.checkpoint.packing import Foreign, Simulated, Stored
from distmerge.clock import during
from distmerge.dense import Buffers, Dense, settle
from distmerge.layout import KEPT_STACKS, Task
from distmerge.numerics.apply import Loaded, as_rows, in_float64
from distmerge.numerics.combine import Combination, Delta, Part, deltas_of
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.lora import Factors
from distmerge.numerics.tuners import LOW_RANK, OPERATORS
from distmerge.plan import Plan
from distmerge.storage.files import copy_range, drop_cache, open_input, read_exact
from distmerge.storage.sharing import share_range
from distmerge.untouched import Untouched

_MAX_OPEN = 64


class Reader:
    """Reads the tensors of `plan` from `base` and `adapters` (folders); several threads may use it at once, each with
    buffers of its own."""

    def __init__(self, plan: Plan, base: Path, adapters: tuple[Path, ...], device: torch.device) -> None:
        self._plan, self._folders, self._device = plan, (base, *adapters), device
        self._marks = {mark.name: mark for mark in plan.base_files}
        self._fds: dict[tuple[int, str], int] = {}
        self.dense = Dense(self.read, device, kept_nbytes=plan.simulated_nbytes)
        # A stack of experts is read once, not once for each of them.
        self._kept: dict[tuple[int, str, str], Tensor] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes every file."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    @property
    def has_many_open(self) -> bool:
        """True if it is time to `trim`."""
        return len(self._fds) > _MAX_OPEN

    def trim(self) -> None:
        """Closes the files if many are open. Only while no thread reads."""
        if self.has_many_open:
            self.close()

    def buffers(self) -> Buffers:
        """Buffers that fit every block of the plan."""
        return Buffers(self._plan, self._device)

    def forget(self, task: Task, first: int, last: int) -> None:
        """Gives the page cache's memory of elements [first, last) of what `task` reads back."""
        stored, packing = task.source, task.source.packing
        if task.origin or isinstance(packing, Foreign | Simulated):
            return  # adapters are small, and what is simulated may be read again
        begin, end = (
            packing.data_nbytes(numel) if packing else numel * ITEMSIZE[stored.data.dtype] for numel in (first, last)
        )
        drop_cache(self._fd(0, stored.data.file), stored.data.begin + begin, end - begin)

    def copy(self, spec: TensorSpec, offset: int, fd: int, place: int, nbytes: int, *, origin: int = 0) -> bool:
        """True if the kernel has copied the bytes of a tensor to byte `place` of another file, all of them."""
        return copy_range(self._fd(origin, spec.file), spec.begin + offset, fd, place, nbytes) == nbytes

    def share(self, one: Untouched, fd: int) -> bool:
        """True if the bytes are in the output file `fd` now, in blocks that it shares with the input."""
        return share_range(self._fd(one.origin, one.file), one.source, fd, one.begin, one.nbytes)

    def read(self, spec: TensorSpec, offset: int, view: memoryview, *, origin: int = 0) -> None:
        """Fills `view` with the bytes of a tensor of the base, or of adapter number `origin`, from byte `offset` on."""
        with during("read"):
            where = f"{self._folders[origin]}/{spec.file}"
            read_exact(self._fd(origin, spec.file), view, spec.begin + offset, where)

    def read_dense(self, buffers: Buffers, stored: Stored, first: int, last: int, *, origin: int = 0) -> Tensor:
        """Elements [first, last) of `stored` in its dense dtype, on the device."""
        return self.dense.read(buffers, stored, first, last, origin=origin)

    def _settle(self) -> None:
        """Waits for the accelerator: what one stream made, the lanes' other streams are about to use."""
        settle(self._device)

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
        if factors is not None and dtype == torch.float32:
            factors = factors.laid_out()
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

    def _fd(self, origin: int, file: str) -> int:
        with self._lock:
            fd = self._fds.get((origin, file))
            if fd is None:
                path = self._folders[origin] / file
                if origin == 0:
                    check_mark(path, self._marks[file])
                fd = self._fds[origin, file] = open_input(path)
            return fd


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
