"""What must be known of a whole tensor before its first block is written: thresholds and scales."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from distmerge.blocks import Block, merged
from distmerge.checkpoint.packing import Simulated
from distmerge.errors import VerifyError
from distmerge.lanes import Lane, Lanes, memory_errors
from distmerge.layout import Task
from distmerge.numerics.apply import Loaded
from distmerge.numerics.combine import Combination, find_thresholds, histograms
from distmerge.packer import Measured, Scales, measure, scales_of
from distmerge.plan import Plan
from distmerge.reader import Reader

Tick = Callable[[], None]


class FirstPass:
    """Goes through tensors of `plan` with `lanes`, before they are merged."""

    def __init__(self, plan: Plan, reader: Reader, lanes: Lanes) -> None:
        self._plan, self._reader, self._lanes = plan, reader, lanes
        self._thresholds: dict[int, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def prepare(self, number: int, tick: Tick) -> Scales | None:
        """Finds what task `number` needs: the scales of its source, the thresholds of its deltas, which are kept, and
        the scales that it is packed with, which are returned."""
        task = self._plan.tasks[number]
        self._learn_scales(task, tick)
        if self._plan.combine.prunes:
            self._find_thresholds(number, tick)
        return self._find_scales(number, tick)

    def load(self, number: int) -> tuple[Loaded, ...] | Combination:
        """The changes of task `number` with their tensors."""
        task = self._plan.tasks[number]
        if not task.changes:
            return ()
        if self._plan.combine.is_sum:
            return self._reader.load_changes(task)
        return replace(self._reader.load_combination(task), thresholds=self._thresholds.get(number, ()))

    def _learn_scales(self, task: Task, tick: Tick) -> None:
        """Goes through the source of `task`, whole, if its elements depend on all of it in 4 bits; once."""
        source, dense = task.source, self._reader.dense
        packing = source.packing
        if not isinstance(packing, Simulated) or not packing.double or dense.knows(source.name):
            return

        def measured(lane: Lane, span: tuple[int, int]) -> tuple[int, Tensor]:
            with lane.work_order():
                return span[0], dense.measure(lane.buffers, source, packing, *span)

        found = sorted(self._lanes.each(packing.spans(), measured, tick), key=lambda each: each[0])
        with memory_errors():
            dense.learn(source.name, packing, [scales for _, scales in found])

    def _find_thresholds(self, number: int, tick: Tick) -> None:
        """Goes through the deltas of task `number`, whole, for the smallest magnitude of each that is kept; once."""
        task = self._plan.tasks[number]
        if number in self._thresholds or not task.changes:
            return
        with memory_errors():
            changes = self._reader.load_combination(task)

        def counted(uppers: tuple[int, ...] | None) -> Tensor:
            total = torch.zeros((), dtype=torch.int64)

            def count(lane: Lane, block: tuple[int, int]) -> None:
                nonlocal total
                with lane.work_order():
                    try:
                        deltas = self._reader.read_deltas(lane.buffers, task, *block, changes.parts)
                    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                        what = f"cannot be decomposed ({error}); is every value of the base finite?"
                        raise VerifyError(what, where=task.name) from None
                    found = histograms(deltas, uppers).cpu()
                with self._lock:
                    total = total + found

            self._lanes.each(map(task.block, task.dense_blocks), count, tick)
            return total

        self._thresholds[number] = find_thresholds(task.source.numel, changes, counted)

    def _find_scales(self, number: int, tick: Tick) -> Scales | None:
        """Goes through the merged values of task `number`, whole, for the scales that it is packed with."""
        task = self._plan.tasks[number]
        if (form := task.form) is None:
            return None
        with memory_errors():
            changes = self.load(number)

        def measured(lane: Lane, block: int) -> Measured:
            first, last = task.block(block)
            one = Block(piece=0, task=task, block=block, first=first, last=last, changes=changes)
            with lane.work_order():
                return measure(merged(lane, self._reader, one), form, block)

        found = self._lanes.each(iter(task.dense_blocks), measured, tick)
        with memory_errors():
            return scales_of(task, form, found)
