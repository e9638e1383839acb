"""Lanes: threads, each with buffers of its own, that take one block at a time through all of its steps."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch

from distmerge.clock import Clock, during
from distmerge.dense import Buffers, host_pair, view_of
from distmerge.errors import MachineError
from distmerge.layout import MEASURED_NUMEL
from distmerge.plan import Plan
from distmerge.reader import Reader

_POLL_SECONDS = 0.1
B = TypeVar("B")
R = TypeVar("R")


class Lane:
    """The buffers that one block passes through, and on an accelerator the stream that its work is queued on."""

    def __init__(self, plan: Plan, device: torch.device, buffers: Buffers) -> None:
        self.buffers, self.clock = buffers, Clock()
        self.out, self._host = host_pair(plan.block_nbytes, device)
        self.view = view_of(self._host)
        first, second = torch.empty(2, MEASURED_NUMEL, dtype=torch.float32, device=device)
        self.scratch = (first, second)
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


class Batch(Generic[R]):
    """Blocks that lanes are at work on."""

    def __init__(self, feed: _Feed[Any], results: list[R], lanes: list[Future[None]]) -> None:
        self._feed, self._results, self._lanes = feed, results, lanes

    def handed_out(self, tick: Callable[[], None]) -> None:
        """Returns when lanes have taken the last block, or one of them has failed; the next batch may begin then.

        `tick` is called a few times a second, and may raise.
        """
        while not self._feed.ended.wait(_POLL_SECONDS):
            tick()

    def finish(self, tick: Callable[[], None]) -> list[R]:
        """What was done, in any order. After an error no further block is begun. `tick` as above."""
        pending = set(self._lanes)
        try:
            while pending:
                _, pending = wait(pending, timeout=_POLL_SECONDS)
                tick()
        finally:
            self._feed.stop()
            wait(self._lanes)
        for lane in self._lanes:
            lane.result()
        return self._results


class Lanes:
    """`num_lanes` lanes for the blocks of `plan`, on `device`."""

    def __init__(self, plan: Plan, reader: Reader, device: torch.device, num_lanes: int) -> None:
        with memory_errors():
            self._lanes = [Lane(plan, device, reader.buffers()) for _ in range(num_lanes)]
        self._device, self._own, self._free = device, threading.local(), deque(self._lanes)
        self._feeds: deque[_Feed[Any]] = deque(maxlen=2)  # at most two batches are worked on
        self._pool = ThreadPoolExecutor(num_lanes, "lane", self._enter)

    @property
    def clocks(self) -> list[Clock]:
        """The clocks of all lanes."""
        return [lane.clock for lane in self._lanes]

    def close(self) -> None:
        """Ends the threads; blocks that no lane has begun are left."""
        for feed in self._feeds:
            feed.stop()
        self._pool.shutdown(wait=True)

    def each(self, blocks: Iterator[B], work: Callable[[Lane, B], R], tick: Callable[[], None]) -> list[R]:
        """`work` on every block, spread over the lanes; what was done, in any order. `tick` as in `Batch`."""
        return self.begin(blocks, work).finish(tick)

    def begin(self, blocks: Iterator[B], work: Callable[[Lane, B], R]) -> Batch[R]:
        """Sets the lanes to `work` on every block, after those of the batch before."""
        feed = _Feed(blocks)
        results: list[R] = []
        self._feeds.append(feed)

        def run() -> None:
            lane = self._own.lane
            try:
                with memory_errors(), lane.clock:
                    for block in feed:
                        with during("compute"):
                            results.append(work(lane, block))
            except BaseException:
                feed.stop()
                raise

        return Batch(feed, results, [self._pool.submit(run) for _ in self._lanes])

    def _enter(self) -> None:
        """Gives a thread its lane. The current accelerator belongs to a thread, too; left alone, lanes would make
        contexts on the first one."""
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device)
        self._own.lane = self._free.popleft()


class _Feed(Generic[B]):
    """Hands the blocks to the lanes in order, and stops handing out when told to."""

    def __init__(self, blocks: Iterator[B]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self.ended = threading.Event()

    def __iter__(self) -> _Feed[B]:
        return self

    def __next__(self) -> B:
        with self._lock:
            if self.ended.is_set():
                raise StopIteration
            try:
                with during("load"):
                    return next(self._blocks)
            except StopIteration:
                self.ended.set()
                raise

    def stop(self) -> None:
        self.ended.set()


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
