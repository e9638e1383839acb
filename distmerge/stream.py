"""Segments through fixed buffers: read a block, dequantize it, add its deltas, round once, write it.

Several lanes work at once, each a thread with buffers of its own that takes one block through all of these steps.
While one lane waits for the disk another one computes: reads, arithmetic and writes overlap without queues, and a
block stays in the cache of one core. torch itself runs on one thread in each lane.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distmerge.checkpoint.header import ITEMSIZE
from distmerge.checkpoint.packing import Simulated
from distmerge.errors import VerifyError
from distmerge.lanes import Lane, Lanes, memory_errors
from distmerge.layout import Piece, Segment, Task
from distmerge.numerics.apply import Applied, Loaded, apply_changes, as_rows
from distmerge.numerics.combine import Combination, combine_changes, find_thresholds, histograms
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.lora import delta_norm
from distmerge.plan import Plan
from distmerge.reader import Reader
from distmerge.storage.files import read_exact, write_exact


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRecord:
    """What was done to a piece: `numel` elements written, and how many of them each change of the task concerned.

    `applied_squared` is the sum of (out - base)^2; `delta_squared` has a change's share of the square of its norm,
    which for a product of factors is wholly that of the piece that holds block 0.
    """

    task: int
    numel: int
    changed: tuple[int, ...]
    applied_squared: float
    delta_squared: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
    """A finished segment: the CRC-32 over the CRC-32s of its blocks in order, and what was done to its pieces."""

    segment: int
    crc32: int
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """One block on its way: element range [first, last) of block number `block` of `task`, and the changes to its
    tensor, one after another or combined."""

    number: int
    piece: int
    task: Task
    block: int
    first: int
    last: int
    changes: tuple[Loaded, ...] | Combination


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """A block that is through: the CRC-32 of its bytes, what each change did, and the sum of (out - base)^2. It does
    not hold the block itself, whose factors must be free to go."""

    number: int
    piece: int
    numel: int
    crc32: int
    applied: tuple[Applied, ...]
    applied_squared: float


class Stream:
    """Does segments of `plan`: reads from `base` and `adapters` (folders), writes to the files that `output` opens.

    `output` gives a descriptor for an output file's number, open for reading and writing.
    """

    def __init__(
        self,
        plan: Plan,
        base: Path,
        adapters: tuple[Path, ...],
        output: Callable[[int], int],
        *,
        device: torch.device,
        num_lanes: int,
    ) -> None:
        self._plan, self._output = plan, output
        self._outputs: dict[int, int] = {}
        self._lock = threading.Lock()
        self._reader = Reader(plan, base, adapters, device)
        self._lanes = Lanes(plan, self._reader, device, num_lanes)
        self._thresholds: dict[int, tuple[int, ...]] = {}
        self.nbytes_done = 0

    def close(self) -> None:
        """Ends the lanes and closes every file."""
        self._lanes.close()
        self._reader.close()
        for fd in self._outputs.values():
            os.close(fd)
        self._outputs = {}

    def run(self, number: int, tick: Callable[[], None]) -> SegmentRecord:
        """Writes segment `number` and returns its record. `tick` is called a few times a second and may raise.

        Raises MachineError for I/O errors and VerifyError for values that are not finite, naming the tensor.
        """
        segment = self._plan.segments[number]
        self._close_others(segment.file)
        for piece in segment.pieces:
            self._learn_scales(self._plan.tasks[piece.task], tick)
        if self._plan.combine.prunes:
            for piece in segment.pieces:
                self._find_thresholds(piece.task, tick)
        norms: dict[int, tuple[float, ...]] = {}
        blocks = self._blocks(segment, norms)
        done = sorted(self._lanes.each(blocks, self._merge_block, tick), key=lambda block: block.number)
        return SegmentRecord(
            segment=number,
            crc32=combine_crc32s([block.crc32 for block in done]),
            pieces=tuple(
                _piece_record(i, self._plan.tasks[piece.task], piece, norms.get(i, ()), done)
                for i, piece in enumerate(segment.pieces)
            ),
        )

    def check(self, record: SegmentRecord, tick: Callable[[], None]) -> bool:
        """True if the bytes on disk are those that `record` was made from."""
        self._close_others(self._plan.segments[record.segment].file)
        blocks = self._blocks(self._plan.segments[record.segment], None)
        done = sorted(self._lanes.each(blocks, self._check_block, tick), key=lambda block: block.number)
        return combine_crc32s([block.crc32 for block in done]) == record.crc32

    def _blocks(self, segment: Segment, norms: dict[int, tuple[float, ...]] | None) -> Iterator[_Block]:
        """The blocks of `segment` in order; where `norms` is given, with factors, whose norms it collects by piece."""
        number = 0
        for i, piece in enumerate(segment.pieces):
            task = self._plan.tasks[piece.task]
            changes = self._load(piece.task) if task.changes and norms is not None else ()
            if norms is not None and piece.first == 0:
                norms[i] = _norms(changes)
            for block in range(piece.first, piece.last):
                first, last = task.block(block)
                yield _Block(number=number, piece=i, task=task, block=block, first=first, last=last, changes=changes)
                number += 1

    def _load(self, number: int) -> tuple[Loaded, ...] | Combination:
        """The changes of task `number` with their tensors."""
        task = self._plan.tasks[number]
        if self._plan.combine.is_sum:
            return self._reader.load_changes(task)
        return replace(self._reader.load_combination(task), thresholds=self._thresholds.get(number, ()))

    def _learn_scales(self, task: Task, tick: Callable[[], None]) -> None:
        """Goes through the source of `task`, whole, if its elements depend on all of it in 4 bits; once."""
        source, dense = task.source, self._reader.dense
        packing = source.packing
        if not isinstance(packing, Simulated) or not packing.double or dense.knows(source.name):
            return

        def measure(lane: Lane, span: tuple[int, int]) -> tuple[int, Tensor]:
            with lane.work_order():
                return span[0], dense.measure(lane.buffers, source, packing, *span)

        found = sorted(self._lanes.each(packing.spans(), measure, tick), key=lambda each: each[0])
        with memory_errors():
            dense.learn(source.name, packing, [scales for _, scales in found])

    def _find_thresholds(self, number: int, tick: Callable[[], None]) -> None:
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

            self._lanes.each(map(task.block, range(task.num_blocks)), count, tick)
            return total

        self._thresholds[number] = find_thresholds(task.source.numel, changes, counted)

    def _merge_block(self, lane: Lane, block: _Block) -> _Done:
        task, numel, squared = block.task, block.last - block.first, 0.0
        applied: tuple[Applied, ...] = ()
        if task.kind == "copy":
            data = lane.buffers.view[: numel * ITEMSIZE[task.dtype]]
            self._reader.read(task.source.data, block.first * ITEMSIZE[task.dtype], data, origin=task.origin)
        else:
            with lane.work_order():
                base = self._reader.read_dense(lane.buffers, task.source, block.first, block.last, origin=task.origin)
                out = lane.out[: numel * ITEMSIZE[task.dtype]].view(torch_dtype(task.dtype))
                applied, squared = _apply(lane, block, base, out)
                data = lane.download(numel * ITEMSIZE[task.dtype])
        write_exact(self._fd_out(task.file), data, self._offset(block), self._plan.files[task.file].name)
        return self._done(block, data, applied, squared)

    def _check_block(self, lane: Lane, block: _Block) -> _Done:
        task = block.task
        data = lane.view[: (block.last - block.first) * ITEMSIZE[task.dtype]]
        read_exact(self._fd_out(task.file), data, self._offset(block), self._plan.files[task.file].name)
        return self._done(block, data)

    def _done(
        self, block: _Block, data: memoryview, applied: tuple[Applied, ...] = (), applied_squared: float = 0.0
    ) -> _Done:
        with self._lock:
            self.nbytes_done += len(data)
        return _Done(
            number=block.number,
            piece=block.piece,
            numel=block.last - block.first,
            crc32=zlib.crc32(data),
            applied=applied,
            applied_squared=applied_squared,
        )

    def _close_others(self, file: int) -> None:
        """Between segments no lane works: closes what the next one need not have open."""
        self._reader.trim()
        for other in [number for number in self._outputs if number != file]:
            os.close(self._outputs.pop(other))

    def _offset(self, block: _Block) -> int:
        return block.task.begin + block.first * ITEMSIZE[block.task.dtype]

    def _fd_out(self, file: int) -> int:
        with self._lock:
            if file not in self._outputs:
                self._outputs[file] = self._output(file)
            return self._outputs[file]


def _apply(lane: Lane, block: _Block, base: Tensor, out: Tensor) -> tuple[tuple[Applied, ...], float]:
    """Writes `base` with its changes to `out`, rounded once; returns what each change did, and the sum of
    (out - base)^2."""
    if not block.changes:
        out.copy_(base)
        if not (lost := ~torch.isfinite(out)).any():
            return (), 0.0
        if (lost & torch.isfinite(base)).any():
            raise _not_finite(block.task)
        return (), 0.0
    work = lane.buffers.work[: block.last - block.first]
    work.copy_(base)
    rows, top, left = as_rows(work, block.first, block.task.row_numel)
    try:
        if isinstance(block.changes, Combination):
            applied = combine_changes(rows, block.changes, block=block.block, top=top, left=left)
        else:
            applied = apply_changes(rows, block.changes, top=top, left=left)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if not torch.isfinite(base).all():
            raise _base_not_finite(block.task) from None
        raise VerifyError(f"cannot be decomposed ({error})", where=block.task.name) from None
    out.copy_(work)
    work.copy_(out).sub_(base)
    squared = float(torch.dot(work, work))
    if not 0 < squared < math.inf:  # float32 cannot hold it, or the sum is of values that are not finite
        if not torch.isfinite(base).all():
            raise _base_not_finite(block.task)
        if not torch.isfinite(out).all():
            raise _not_finite(block.task)
        squared = float(work.cpu().double().square().sum())
    return applied, squared


def _norms(changes: tuple[Loaded, ...] | Combination) -> tuple[float, ...]:
    """The norm of each change as far as factors tell it, 0 for operators."""
    if isinstance(changes, Combination):
        return changes.delta_norms
    return tuple(delta_norm(change.factors) if change.factors else 0.0 for change in changes)


def _base_not_finite(task: Task) -> VerifyError:
    return VerifyError("the base holds values that are not finite", where=task.name)


def _not_finite(task: Task) -> VerifyError:
    return VerifyError(
        f"a merged value does not fit {task.dtype}",
        where=task.name,
        hint="--dtype bfloat16 or float32 has the range",
    )


def _piece_record(i: int, task: Task, piece: Piece, norms: tuple[float, ...], done: list[_Done]) -> PieceRecord:
    mine = [block for block in done if block.piece == i]
    applied = [block.applied for block in mine]
    return PieceRecord(
        task=piece.task,
        numel=sum(block.numel for block in mine),
        changed=tuple(sum(each[number].numel for each in applied) for number in range(len(task.changes))),
        applied_squared=math.fsum(block.applied_squared for block in mine),
        delta_squared=tuple(
            (norms[number] ** 2 if norms else 0.0) + math.fsum(each[number].squared for each in applied)
            for number in range(len(task.changes))
        ),
    )


def combine_crc32s(blocks: list[int]) -> int:
    """The checksum of a segment from those of its blocks, in order: lanes end them in any order."""
    return zlib.crc32(b"".join(crc32.to_bytes(4, "little") for crc32 in blocks))
