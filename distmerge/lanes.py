"""Lanes: threads, each with buffers of its own, that take one block at a time through all of its steps."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Generic, TypeVar

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


class Lanes:
    """`num_lanes` lanes for the blocks of `plan`, on `device`."""

    def __init__(self, plan: Plan, reader: Reader, device: torch.device, num_lanes: int) -> None:
        with memory_errors():
            self._lanes = [Lane(plan, device, reader.buffers()) for _ in range(num_lanes)]
        # The current accelerator belongs to a thread; left alone, lanes would make contexts on the first one.
        choose = partial(torch.accelerator.set_device_index, device) if device.type != "cpu" else None
        self._pool = ThreadPoolExecutor(num_lanes, "lane", choose)

    @property
    def clocks(self) -> list[Clock]:
        """The clocks of all lanes."""
        return [lane.clock for lane in self._lanes]

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True)

    def each(self, blocks: Iterator[B], work: Callable[[Lane, B], R], tick: Callable[[], None]) -> list[R]:
        """`work` on every block, spread over the lanes; what was done, in any order.

        `tick` is called a few times a second, and may raise. After an error no further block is begun.
        """
        feed = _Feed(blocks)
        results: list[R] = []

        def run(lane: Lane) -> None:
            try:
                with memory_errors(), lane.clock:
                    for block in feed:
                        with during("compute"):
                            results.append(work(lane, block))
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
        return results


class _Feed(Generic[B]):
    """Hands the blocks to the lanes in order, and stops handing out when told to."""

    def __init__(self, blocks: Iterator[B]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._stopped = False

    def __iter__(self) -> _Feed[B]:
        return self

    def __next__(self) -> B:
        with self._lock:
            if self._stopped:
                raise StopIteration
            with during("load"):
                return next(self._blocks)

    def stop(self) -> None:
        self._stopped = True


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
