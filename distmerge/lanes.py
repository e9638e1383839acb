"""Lanes: threads, each with buffers of its own, that take one block at a time through all of its steps."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue
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

    def settle(self) -> None:
        """Waits for what is queued: memory that a lane gives up is handed out again at once, and not in its order."""
        if self._stream is not None:
            self._stream.synchronize()


class Batch(Generic[B, R]):
    """Blocks that lanes are at work on."""

    def __init__(self, feed: _Feed[B], results: list[R], again: Callable[[], list[Future[None]]]) -> None:
        self._feed, self._results, self._again = feed, results, again
        self._lanes = again()

    def handed_out(self, tick: Callable[[], None]) -> None:
        """Returns when lanes have taken the last block, or one of them has failed; the next batch may begin then.

        `tick` is called a few times a second, and may raise.
        """
        while not self._feed.ended.wait(_POLL_SECONDS):
            tick()
            if all(lane.done() for lane in self._lanes) and not self._goes_on():
                return  # not one could begin

    def finish(self, tick: Callable[[], None]) -> list[R]:
        """What was done, in any order. After an error no further block is begun. `tick` as above."""
        pending = set(self._lanes)
        try:
            while pending:
                pending = wait(pending, timeout=_POLL_SECONDS).not_done
                tick()
                if not pending and self._goes_on():
                    pending = set(self._lanes)
        finally:
            self._feed.stop()
            wait(self._lanes)
        for lane in self._lanes:
            lane.result()
        return self._results

    def _goes_on(self) -> bool:
        """True if blocks were given up when no other lane was at work; lanes are sent for them."""
        if more := self._feed.has_more():
            self._lanes += self._again()
        return more


class Lanes:
    """`num_lanes` lanes for the blocks of `plan`, on `device`, or as many as memory holds. Where it runs out later a
    lane gives up its buffers, for good, and its block, which another one does: fewer lanes, but the same blocks."""

    def __init__(self, plan: Plan, reader: Reader, device: torch.device, num_lanes: int) -> None:
        self._lanes: list[Lane] = []
        with memory_errors():
            for _ in range(num_lanes):
                try:
                    self._lanes.append(Lane(plan, device, reader.buffers()))
                except (MemoryError, RuntimeError) as error:
                    if not self._lanes or not is_out_of_memory(error):
                        raise
                    break
        self._leaving = threading.Lock()
        self._free = SimpleQueue[Lane]()
        for lane in self._lanes:
            self._free.put(lane)
        self._feeds: deque[_Feed[Any]] = deque(maxlen=2)  # at most two batches are worked on
        # The current accelerator belongs to a thread; left alone, lanes would make contexts on the first one.
        choose = partial(torch.accelerator.set_device_index, device) if device.type != "cpu" else None
        self._pool, self._num_threads = ThreadPoolExecutor(num_lanes, "lane", choose), num_lanes
        self.clocks = [lane.clock for lane in self._lanes]
        """The clocks of all lanes, also of those that have left."""

    def close(self) -> None:
        """Ends the threads; blocks that no lane has begun are left."""
        for feed in self._feeds:
            feed.stop()
        self._pool.shutdown(wait=True)

    def each(self, blocks: Iterator[B], work: Callable[[Lane, B], R], tick: Callable[[], None]) -> list[R]:
        """`work` on every block, spread over the lanes; what was done, in any order. `tick` as in `Batch`."""
        return self.begin(blocks, work).finish(tick)

    def begin(self, blocks: Iterator[B], work: Callable[[Lane, B], R]) -> Batch[B, R]:
        """Sets the lanes to `work` on every block, after those of the batch before."""
        feed = _Feed(blocks)
        results: list[R] = []
        self._feeds.append(feed)

        def run() -> None:
            lane = self._free.get()  # of the batch before, when it is through with that
            try:
                with memory_errors(), lane.clock:
                    self._work(lane, feed, work, results)
            except BaseException:
                feed.stop()
                raise
            finally:
                if lane in self._lanes:
                    self._free.put(lane)

        return Batch(feed, results, lambda: [self._pool.submit(run) for _ in range(self._num_threads)])

    def _work(self, lane: Lane, feed: _Feed[B], work: Callable[[Lane, B], R], results: list[R]) -> None:
        for block in feed:
            num_lanes = len(self._lanes)
            try:
                with during("compute"):
                    results.append(work(lane, block))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not self._gives_up(lane, num_lanes):
                    raise
                lane.settle()
                feed.give_back(block)
                return

    def _gives_up(self, lane: Lane, num_lanes: int) -> bool:
        """True if `lane`, for which memory ran out among `num_lanes`, leaves, or is the last and another one has left
        since."""
        with self._leaving:
            if len(self._lanes) == 1:
                return num_lanes > 1
            self._lanes.remove(lane)
            return True


class _Feed(Generic[B]):
    """Hands the blocks to the lanes in order, and stops handing out when told to. `ended` is set when there is none
    left; what is given back is handed out again all the same."""

    def __init__(self, blocks: Iterator[B]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._returned: deque[B] = deque()
        self._stopped = False
        self.ended = threading.Event()

    def __iter__(self) -> _Feed[B]:
        return self

    def __next__(self) -> B:
        with self._lock:
            if self._returned and not self._stopped:
                return self._returned.popleft()
            if self.ended.is_set():
                raise StopIteration
            try:
                with during("load"):
                    return next(self._blocks)
            except StopIteration:
                self.ended.set()
                raise

    def give_back(self, block: B) -> None:
        self._returned.append(block)

    def has_more(self) -> bool:
        return bool(self._returned) and not self._stopped

    def stop(self) -> None:
        self._stopped = True
        self.ended.set()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns running out of memory, of the host or of an accelerator, into a MachineError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            "out of memory", where=f"pid {os.getpid()}", hint="a smaller --memory-budget, or fewer ranks"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise where memory runs out, of the host or of an accelerator."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")  # of the host, of a driver, of cuBLAS
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)
