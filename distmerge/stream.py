"""Segments through fixed buffers: read a block, dequantize it, add its deltas, round once, write it.

Several lanes work at once, each a thread with buffers of its own that takes one block through all of these steps.
While one lane waits for the disk another one computes: reads, arithmetic and writes overlap without queues, and a
block stays in the cache of one core. torch itself runs on one thread in each lane.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from distmerge.blocks import NOTHING, Block, Effect, write_values
from distmerge.checkpoint.header import ITEMSIZE
from distmerge.checkpoint.packing import Simulated
from distmerge.clock import Clock, during
from distmerge.first_pass import FirstPass
from distmerge.lanes import Batch, Lane, Lanes
from distmerge.layout import LARGEST_SPECTRUM, Piece, Segment, Task
from distmerge.numerics.apply import Loaded
from distmerge.numerics.combine import Combination
from distmerge.numerics.spectrum import Whole, whole_of
from distmerge.numerics.survival import Sums, total
from distmerge.packer import Scales
from distmerge.page_cache import outgrows_cache
from distmerge.plan import Plan
from distmerge.reader import Reader
from distmerge.storage.checksums import crc32, join_crc32s
from distmerge.storage.files import read_exact, write_exact
from distmerge.untouched import untouched


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRecord:
    """What was done to a piece: `numel` elements written, and how many of them each change of the task concerned.

    `delta_squared` has a change's share of the square of its norm, which for a product of factors is wholly that of the
    piece that holds block 0; so are the `singular` values of all changes together. `sums` tell what is left of them
    after rounding, null where there are none. `not_finite` counts values of a tensor that was only converted.
    """

    task: int
    numel: int
    changed: tuple[int, ...]
    delta_squared: tuple[float, ...]
    sums: Sums | None
    singular: tuple[float, ...]
    not_finite: int

    @property
    def applied_squared(self) -> float:
        """The sum of (out - base)^2."""
        return 0.0 if self.sums is None else self.sums.applied_squared


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
    """A finished segment: the CRC-32 of its bytes, null for files that get no checksum, and what was done to its
    pieces."""

    segment: int
    crc32: int | None
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """A block that is through: the CRC-32 of its bytes, if there is to be one, and what was done to it. It does not
    hold the block itself, whose factors must be free to go."""

    piece: int
    block: int
    numel: int
    nbytes: int
    crc32: int
    effect: Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is known of a segment's pieces beside their blocks: which are there already, in blocks of the disk that the
    output shares with an input, and by the number of a piece what its changes are as a whole, once block 0 is done."""

    shared: frozenset[int]
    wholes: dict[int, Whole] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A segment that lanes are at work on: what of it is `done` already, and its last `batch`."""

    segment: int
    done: list[_Done]
    batch: Batch[Block, _Done]
    known: _Known


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
        self._forgets = outgrows_cache(plan)
        self._outputs: dict[int, int] = {}
        self._lock = threading.Lock()
        self._reader = Reader(plan, base, adapters, device)
        self._lanes = Lanes(plan, self._reader, device, num_lanes)
        self._first_pass = FirstPass(plan, self._reader, self._lanes)
        self._num_running = 0
        self.nbytes_done = 0

    @property
    def clocks(self) -> list[Clock]:
        """The clocks of the lanes."""
        return self._lanes.clocks

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
        return self.finish(self.begin(number, tick), tick)

    def begin(self, number: int, tick: Callable[[], None]) -> Running:
        """Sets the lanes to write segment `number`; once they have its last block, the next one that `follows` may be
        begun. Raises as `run` does."""
        segment = self._plan.segments[number]
        if self._num_running == 0:  # lanes that are ending another segment have files in use
            self._close_others(segment.file)
        self._num_running += 1
        known = _Known(shared=self._share(segment))
        done: list[_Done] = []
        *first, last = _batches(self._plan, segment)
        for pieces in first:
            done += self._write(segment, pieces, known, tick).finish(tick)
        return Running(segment=number, done=done, batch=self._write(segment, last, known, tick), known=known)

    def follows(self, number: int, running: Running) -> bool:
        """True if segment `number` may begin before `running` is finished: it is of the same file, and what must be
        known of a whole tensor is not kept for two of them. False now and then, so that files can be closed."""
        one, other = (self._plan.segments[each] for each in (number, running.segment))
        tasks = [self._plan.tasks[piece.task] for segment in (one, other) for piece in segment.pieces]
        plain = all(task.form is None and not isinstance(task.source.packing, Simulated) for task in tasks)
        alike = one.file == other.file and plain and not self._plan.combine.prunes
        return alike and not self._reader.has_many_open

    def finish(self, running: Running, tick: Callable[[], None]) -> SegmentRecord:
        """The record of what was begun, once it is written. Raises as `run` does."""
        segment = self._plan.segments[running.segment]
        done = sorted([*running.done, *running.batch.finish(tick)], key=_place)
        self._num_running -= 1
        if self._forgets:
            self._forget(segment)
        by_piece = {i: list(blocks) for i, blocks in groupby(done, key=lambda block: block.piece)}
        return SegmentRecord(
            segment=running.segment,
            crc32=_joined(done) if self._plan.file_digest != "none" else None,
            pieces=tuple(
                _piece_record(
                    self._plan.tasks[piece.task], piece, running.known.wholes.get(i, Whole()), by_piece.get(i, [])
                )
                for i, piece in enumerate(segment.pieces)
            ),
        )

    def check(self, record: SegmentRecord, tick: Callable[[], None]) -> bool:
        """True if the bytes on disk are those that `record` was made from."""
        segment = self._plan.segments[record.segment]
        self._close_others(segment.file)
        blocks = self._blocks(segment, range(len(segment.pieces)), None, None)
        done = sorted(self._lanes.each(blocks, self._check_block, tick), key=_place)
        return _joined(done) == record.crc32

    def _write(self, segment: Segment, pieces: range, known: _Known, tick: Callable[[], None]) -> Batch[Block, _Done]:
        scales = [self._first_pass.prepare(segment.pieces[i].task, tick) for i in pieces]
        blocks = self._blocks(segment, pieces, known, next(iter(scales), None))
        return self._lanes.begin(blocks, partial(self._merge_block, known))

    def _blocks(self, segment: Segment, pieces: range, known: _Known | None, scales: Scales | None) -> Iterator[Block]:
        """The blocks of `pieces` of `segment` in order; where `known` is given, with the changes."""
        for i in pieces:
            piece = segment.pieces[i]
            task = self._plan.tasks[piece.task]
            changes = self._first_pass.load(piece.task) if known is not None else ()
            shared = known is not None and i in known.shared
            for number in range(piece.first, piece.last):
                first, last = task.block(number)
                block = Block(piece=i, task=task, block=number, first=first, last=last, changes=changes, scales=scales)
                yield replace(block, shared=True) if shared else block

    def _merge_block(self, known: _Known, lane: Lane, block: Block) -> _Done:
        if block.block == 0 and block.changes:
            with during("load"), lane.work_order():
                known.wholes[block.piece] = _whole(block.changes)
        if self._plan.file_digest == "none" and (block.shared or self._copied(block)):
            return self._done(block, b"")
        if block.shared:
            return self._check_block(lane, block)
        data, effect = write_values(lane, self._reader, block)
        with during("write"):
            name = self._plan.files[block.task.file].name
            write_exact(self._fd_out(block.task.file), data, self._offset(block), name)
        return self._done(block, data, effect)

    def _share(self, segment: Segment) -> frozenset[int]:
        """Has the output share the blocks of what is untouched, where it can: the numbers of the pieces that are in
        their places by that. If they get a checksum, it is of what the output then holds."""
        found = untouched(self._plan.tasks, segment.pieces)
        fd = self._fd_out(segment.file)
        return frozenset(piece for one in found if self._reader.share(one, fd) for piece in one.pieces)

    def _copied(self, block: Block) -> bool:
        """True if the kernel has copied the block: it need not be looked at, and no checksum of it is wanted."""
        task = block.task
        if task.kind != "copy":
            return False
        with during("write"):
            fd, place, nbytes = self._fd_out(task.file), self._offset(block), task.block_nbytes(block.block)
            begin = block.first * ITEMSIZE[task.dtype]
            return self._reader.copy(task.source.data, begin, fd, place, nbytes, origin=task.origin)

    def _check_block(self, lane: Lane, block: Block) -> _Done:
        task = block.task
        data = lane.view[: task.block_nbytes(block.block)]
        with during("read"):
            read_exact(self._fd_out(task.file), data, self._offset(block), self._plan.files[task.file].name)
        return self._done(block, data)

    def _done(self, block: Block, data: memoryview | bytes, effect: Effect = NOTHING) -> _Done:
        nbytes = block.task.block_nbytes(block.block)
        with self._lock:
            self.nbytes_done += nbytes
        with during("hash"):
            checksum = crc32(data) if self._plan.file_digest != "none" else 0
        return _Done(
            piece=block.piece,
            block=block.block,
            numel=block.last - block.first,
            nbytes=nbytes,
            crc32=checksum,
            effect=effect,
        )

    def _forget(self, segment: Segment) -> None:
        """Gives the page cache's memory of what a segment was made from."""
        for piece in segment.pieces:
            if piece.last > piece.first:
                task = self._plan.tasks[piece.task]
                self._reader.forget(task, *task.elements(piece.first, piece.last))

    def _close_others(self, file: int) -> None:
        """Closes what the next segment need not have open. Only while no lane works."""
        self._reader.trim()
        for other in [number for number in self._outputs if number != file]:
            os.close(self._outputs.pop(other))

    def _offset(self, block: Block) -> int:
        return block.task.begin + block.task.block_begin(block.block)

    def _fd_out(self, file: int) -> int:
        with self._lock:
            if file not in self._outputs:
                self._outputs[file] = self._output(file)
            return self._outputs[file]


def _batches(plan: Plan, segment: Segment) -> Iterator[range]:
    """The numbers of the pieces of `segment` that can be worked on together: a tensor that is packed is measured
    first, alone."""
    begin = 0
    for number, piece in enumerate(segment.pieces):
        if plan.tasks[piece.task].form is not None:
            if number > begin:
                yield range(begin, number)
            yield range(number, number + 1)
            begin = number + 1
    if begin < len(segment.pieces) or not segment.pieces:
        yield range(begin, len(segment.pieces))


def _place(done: _Done) -> tuple[int, int]:
    return done.piece, done.block


def _whole(changes: tuple[Loaded, ...] | Combination) -> Whole:
    if isinstance(changes, Combination):
        return Whole(norms=changes.delta_norms)
    return whole_of(changes, max_r=LARGEST_SPECTRUM)


def _piece_record(task: Task, piece: Piece, whole: Whole, mine: list[_Done]) -> PieceRecord:
    applied = [block.effect.applied for block in mine if block.effect.applied]
    sums = [block.effect.sums for block in mine if block.effect.sums is not None]
    return PieceRecord(
        task=piece.task,
        numel=sum(block.numel for block in mine),
        changed=tuple(sum(each[number].numel for each in applied) for number in range(len(task.changes))),
        delta_squared=tuple(
            (whole.norms[number] ** 2 if whole.norms else 0.0) + math.fsum(each[number].squared for each in applied)
            for number in range(len(task.changes))
        ),
        sums=total(sums) if sums else None,
        singular=whole.singular,
        not_finite=sum(block.effect.not_finite for block in mine),
    )


def _joined(done: list[_Done]) -> int:
    """The CRC-32 of a segment from those of its blocks, in order: lanes end them in any order."""
    return join_crc32s((block.crc32, block.nbytes) for block in done)
