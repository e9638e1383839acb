"""Blocks of an output beside what the inputs say they should be."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from distmerge.audit.packed import Head, read_head, unpacked
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.checkpoint.packed_form import PackedForm
from distmerge.config import MergeConfig
from distmerge.dense import Buffers
from distmerge.layout import Task
from distmerge.numerics.apply import Loaded
from distmerge.numerics.combine import Combination, find_thresholds, histograms
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.lora import delta_norm
from distmerge.numerics.noise import Exact, recompute, recompute_combined
from distmerge.plan import Plan
from distmerge.reader import Reader
from distmerge.storage.files import open_input, read_exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is done to one tensor, loaded: `exact` gives the float64 values of a block from the base's; `delta_norms`
    has the norm of each change as far as factors tell it, `changes` the changes if nothing combines them."""

    exact: Callable[[Tensor, int], Exact]
    delta_norms: tuple[float, ...]
    changes: tuple[Loaded, ...] | None


class Pairs:
    """The output's files beside the inputs of `plan`; several threads may use it, each with buffers of its own. A
    context manager that closes the files."""

    def __init__(self, plan: Plan, config: MergeConfig, tensors: dict[str, TensorSpec], device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.reader = Reader(plan, config.base, tuple(adapter.home for adapter in config.all_adapters), device)
        self._folder: Path = config.output
        self._tensors = tensors
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Pairs:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self.close_others("")

    def close_others(self, file: str) -> None:
        """Closes all files of the output but `file`, and many of the inputs. Only while no thread reads."""
        self.reader.trim()
        for other in [name for name in self._fds if name != file]:
            os.close(self._fds.pop(other))

    def recipe(self, task: Task, buffers: Buffers) -> Recipe:
        """What is done to `task`; where magnitudes decide, its deltas are gone through for the thresholds."""
        if self.plan.combine.is_sum:
            changes = self.reader.load_changes(task, torch.float64)
            return Recipe(
                exact=lambda base, block: recompute(
                    base, changes, first=task.block(block)[0], row_numel=task.row_numel
                ),
                delta_norms=tuple(delta_norm(change.factors) if change.factors else 0.0 for change in changes),
                changes=changes,
            )
        combination = self.reader.load_combination(task)
        if self.plan.combine.prunes:
            combination = replace(combination, thresholds=self._thresholds(task, combination, buffers))
        wide, begin = self.reader.load_parts(task, torch.float64), task.dense_blocks.start
        return Recipe(
            exact=lambda base, block: recompute_combined(
                base,
                combination,
                wide,
                block=block - begin,
                first=task.block(block)[0],
                row_numel=task.row_numel,
            ),
            delta_norms=replace(combination, parts=wide).delta_norms,
            changes=None,
        )

    def _thresholds(self, task: Task, combination: Combination, buffers: Buffers) -> tuple[int, ...]:
        def counted(uppers: tuple[int, ...] | None) -> Tensor:
            blocks = map(task.block, task.dense_blocks)
            deltas = (self.reader.read_deltas(buffers, task, *block, combination.parts) for block in blocks)
            return reduce(torch.add, (histograms(each, uppers) for each in deltas))

        return find_thresholds(task.source.numel, combination, counted)

    def base(self, buffers: Buffers, task: Task, block: int) -> Tensor:
        """The base's values of a block, dense, in their own dtype, flat; they lie in `buffers`."""
        return self.reader.read_dense(buffers, task.source, *task.block(block), origin=task.origin)

    def stored(self, task: Task, block: int, head: Head | None = None) -> Tensor:
        """What the output holds in place of a block, in the dtype of the task, flat; of a packed one what a loader
        makes of it. `head` is that of the task, if it is known."""
        if task.form is None:
            return self.bytes(task, block).view(torch_dtype(task.dtype))
        return unpacked(task, task.form, head or self.head(task, task.form), block, self.bytes(task, block))

    def head(self, task: Task, form: PackedForm) -> Head:
        """What stands beside the codes of a packed tensor."""
        return read_head(task, form, bytearray(self.bytes(task, 0).cpu().numpy().tobytes()), self.device)

    def bytes(self, task: Task, block: int) -> Tensor:
        """The bytes that the output holds in place of a block."""
        spec, data = self._spec(task), bytearray(task.block_nbytes(block))
        read_exact(self._fd(spec.file), memoryview(data), spec.begin + task.block_begin(block), spec.file)
        return torch.frombuffer(data, dtype=torch.uint8).to(self.device)

    def base_bytes(self, buffers: Buffers, task: Task, block: int) -> Tensor:
        """The bytes that the output should hold in place of a block of a tensor that is not merged."""
        if task.kind == "copy":
            first, last = task.block(block)
            size = ITEMSIZE[task.dtype]
            view = buffers.view[: (last - first) * size]
            self.reader.read(task.source.data, first * size, view, origin=task.origin)
            return buffers.upload(len(view))
        return self.base(buffers, task, block).to(torch_dtype(task.dtype)).view(torch.uint8)

    def file_of(self, task: Task) -> str:
        """The file of the output that holds `task`."""
        return self._spec(task).file

    def _spec(self, task: Task) -> TensorSpec:
        """The first tensor of the output that `task` is."""
        return self._tensors[task.parts[0].name]

    def _fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                self._fds[file] = open_input(self._folder / file)
            return self._fds[file]
