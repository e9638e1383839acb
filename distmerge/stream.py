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
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distmerge.checkpoint.header import ITEMSIZE
from distmerge.errors import MachineError, VerifyError
from distmerge.layout import BLOCK_NUMEL, Piece, Segment, Task
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.lora import Factors, add_deltas, delta_norm
from distmerge.plan import Plan
from distmerge.reader import Buffers, Reader, host_pair, view_of
from distmerge.storage.files import read_exact, write_exact

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRecord:
    """What was done to a piece: `numel` elements written, each with `num_deltas` deltas added.

    `applied_squared` is the sum of (out - base)^2; `delta_norms` are given by the piece that holds block 0.
    """

    task: int
    numel: int
    num_deltas: int
    applied_squared: float
    delta_norms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
    """A finished segment: the CRC-32 over the CRC-32s of its blocks in order, and what was done to its pieces."""

    segment: int
    crc32: int
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """One block on its way: element range [first, last) of `task`, and the factors that its tensor needs."""

    number: int
    piece: int
    task: Task
    first: int
    last: int
    factors: tuple[Factors, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What became of a block: the CRC-32 of its bytes, the deltas that were added, and the sum of (out - base)^2."""

    crc32: int
    num_deltas: int = 0
    applied_squared: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """A block that is through. It does not hold the block itself, whose factors must be free to go."""

    number: int
    piece: int
    numel: int
    outcome: _Outcome


class Lane:
    """The buffers that one block passes through, and on an accelerator the stream that its work is queued on."""

    def __init__(self, plan: Plan, device: torch.device, buffers: Buffers) -> None:
        self.buffers = buffers
        nbytes = BLOCK_NUMEL * max(ITEMSIZE[task.dtype] for task in plan.tasks)
        self.out, self._host = host_pair(nbytes, device)
        self.view = view_of(self._host)
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def work_order(self) -> AbstractContextManager[object]:
        """Queues the accelerator's work of the body on this lane's own stream."""
        return nullcontext() if self._stream is None else self._stream

    def download(self, nbytes: int) -> memoryview:
        """The first `nbytes` of the result, on the host."""
        if self._stream is not None:
            self._host[:nbytes].copy_(self.out[:nbytes], non_blocking=True)
            self._stream.synchronize()
        return self.view[:nbytes]


class _Feed:
    """Hands the blocks of a segment to the lanes in order, and stops handing out when told to."""

    def __init__(self, blocks: Iterator[_Block]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._stopped = False

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> _Block:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._blocks)

    def stop(self) -> None:
        self._stopped = True


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
        with memory_errors():
            self._lanes = [Lane(plan, device, self._reader.buffers()) for _ in range(num_lanes)]
        # The current accelerator belongs to a thread; left alone, lanes would make contexts on the first one.
        choose = partial(torch.accelerator.set_device_index, device) if device.type != "cpu" else None
        self._pool = ThreadPoolExecutor(num_lanes, "lane", choose)
        self.nbytes_done = 0

    def close(self) -> None:
        """Ends the lanes and closes every file."""
        self._pool.shutdown(wait=True)
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
        norms: dict[int, tuple[float, ...]] = {}
        blocks = self._blocks(segment, norms)
        done = self._each(blocks, self._merge_block, tick)
        return SegmentRecord(
            segment=number,
            crc32=combine_crc32s([block.outcome.crc32 for block in done]),
            pieces=tuple(_piece_record(i, piece, norms.get(i, ()), done) for i, piece in enumerate(segment.pieces)),
        )

    def check(self, record: SegmentRecord, tick: Callable[[], None]) -> bool:
        """True if the bytes on disk are those that `record` was made from."""
        self._close_others(self._plan.segments[record.segment].file)
        blocks = self._blocks(self._plan.segments[record.segment], None)
        done = self._each(blocks, self._check_block, tick)
        return combine_crc32s([block.outcome.crc32 for block in done]) == record.crc32

    def _each(
        self,
        blocks: Iterator[_Block],
        work: Callable[[Lane, _Block], _Outcome],
        tick: Callable[[], None],
    ) -> list[_Done]:
        """`work` on every block, spread over the lanes; what was done, in the order of the blocks."""
        feed = _Feed(blocks)
        results: list[_Done] = []

        def run(lane: Lane) -> None:
            try:
                with memory_errors():
                    for block in feed:
                        outcome, numel = work(lane, block), block.last - block.first
                        results.append(_Done(number=block.number, piece=block.piece, numel=numel, outcome=outcome))
                        with self._lock:
                            self.nbytes_done += numel * ITEMSIZE[block.task.dtype]
            except BaseException:
                feed.stop()
                raise

        pending = {self._pool.submit(run, lane) for lane in self._lanes}
        futures = list(pending)
        try:
            while pending:
                _, pending = wait(pending, timeout=_POLL_SECONDS)
                tick()
        finally:
            feed.stop()
            wait(futures)
        for future in futures:
            future.result()
        return sorted(results, key=lambda done: done.number)

    def _blocks(self, segment: Segment, norms: dict[int, tuple[float, ...]] | None) -> Iterator[_Block]:
        """The blocks of `segment` in order; where `norms` is given, with factors, whose norms it collects by piece."""
        number = 0
        for i, piece in enumerate(segment.pieces):
            task = self._plan.tasks[piece.task]
            factors = self._reader.load_factors(task) if task.deltas and norms is not None else ()
            if norms is not None and piece.first == 0:
                norms[i] = tuple(delta_norm(factor) for factor in factors)
            for block in range(piece.first, piece.last):
                first, last = task.block(block)
                yield _Block(number=number, piece=i, task=task, first=first, last=last, factors=factors)
                number += 1

    def _merge_block(self, lane: Lane, block: _Block) -> _Outcome:
        task, numel, num_deltas, squared = block.task, block.last - block.first, 0, 0.0
        if task.kind == "copy":
            data = lane.buffers.view[: numel * ITEMSIZE[task.dtype]]
            self._reader.read(task.source.data, block.first * ITEMSIZE[task.dtype], data)
        else:
            with lane.work_order():
                base = self._reader.read_dense(lane.buffers, task.source, block.first, block.last)
                out = lane.out[: numel * ITEMSIZE[task.dtype]].view(torch_dtype(task.dtype))
                num_deltas, squared = _apply(lane, block, base, out)
                data = lane.download(numel * ITEMSIZE[task.dtype])
        write_exact(self._fd_out(task.file), data, self._offset(block), self._plan.files[task.file].name)
        return _Outcome(crc32=zlib.crc32(data), num_deltas=num_deltas, applied_squared=squared)

    def _check_block(self, lane: Lane, block: _Block) -> _Outcome:
        task = block.task
        data = lane.view[: (block.last - block.first) * ITEMSIZE[task.dtype]]
        read_exact(self._fd_out(task.file), data, self._offset(block), self._plan.files[task.file].name)
        return _Outcome(crc32=zlib.crc32(data))

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


def _apply(lane: Lane, block: _Block, base: Tensor, out: Tensor) -> tuple[int, float]:
    """Writes `base` plus its deltas to `out`, rounded once; returns how many deltas, and the sum of (out - base)^2."""
    if not block.factors:
        out.copy_(base)
        if not (lost := ~torch.isfinite(out)).any():
            return 0, 0.0
        if (lost & torch.isfinite(base)).any():
            raise _not_finite(block.task)
        return 0, 0.0
    numel, row = block.last - block.first, block.task.row_numel
    work = lane.buffers.work[:numel]
    work.copy_(base)
    top, left = divmod(block.first, row)
    height, width = max(1, numel // row), min(numel, row)
    cols = slice(left, left + width)
    num_deltas = add_deltas(work.view(height, width), block.factors, rows=slice(top, top + height), cols=cols)
    out.copy_(work)
    work.copy_(out).sub_(base)
    squared = float(torch.dot(work, work))
    if not 0 < squared < math.inf:  # float32 cannot hold it, or the sum is of values that are not finite
        if not torch.isfinite(base).all():
            raise VerifyError("the base holds values that are not finite", where=block.task.name)
        if not torch.isfinite(out).all():
            raise _not_finite(block.task)
        squared = float(work.cpu().double().square().sum())
    return num_deltas, squared


def _not_finite(task: Task) -> VerifyError:
    return VerifyError(
        f"a merged value does not fit {task.dtype}",
        where=task.name,
        hint="--dtype bfloat16 or float32 has the range",
    )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns running out of memory, of the host or of an accelerator, into a MachineError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has an own class for accelerators and none for the host
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise MachineError(
            "out of memory", where=f"pid {os.getpid()}", hint="a smaller --memory-budget, or fewer ranks"
        ) from error


def _piece_record(i: int, piece: Piece, norms: tuple[float, ...], done: list[_Done]) -> PieceRecord:
    mine = [block for block in done if block.piece == i]
    return PieceRecord(
        task=piece.task,
        numel=sum(block.numel for block in mine),
        num_deltas=min((block.outcome.num_deltas for block in mine), default=0),
        applied_squared=math.fsum(block.outcome.applied_squared for block in mine),
        delta_norms=norms,
    )


def combine_crc32s(blocks: list[int]) -> int:
    """The checksum of a segment from those of its blocks, in order: lanes end them in any order."""
    return zlib.crc32(b"".join(crc32.to_bytes(4, "little") for crc32 in blocks))
