"""Clocks: where the time of a thread goes, step by step."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Literal

Step = Literal["read", "load", "compute", "measure", "hash", "write", "digest", "fsync", "idle"]


class Clock:
    """Seconds that one thread spent in each step; inside of `with clock`, the thread's own calls of `during` count.

    A step inside of another one interrupts it. What is no step is idleness.
    """

    def __init__(self) -> None:
        self.seconds: dict[Step, float] = {}
        self._step: Step = "idle"
        self._since = 0.0

    def __enter__(self) -> Clock:
        self._step, self._since = "idle", time.perf_counter()
        _here.clock = self
        return self

    def __exit__(self, *_: object) -> None:
        self.turn("idle")
        _here.clock = None

    def turn(self, step: Step) -> Step:
        """Begins `step` and returns the one that was going on."""
        now, before = time.perf_counter(), self._step
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._step, self._since = step, now
        return before


class during:  # noqa: N801 - it reads as a verb, as contextlib's do
    """In the body, what this thread does is `step`; nothing at all in a thread without a clock."""

    __slots__ = ("_before", "_clock", "_step")

    def __init__(self, step: Step) -> None:
        self._step = step

    def __enter__(self) -> None:
        self._clock: Clock | None = getattr(_here, "clock", None)
        if self._clock is not None:
            self._before = self._clock.turn(self._step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._clock is not None:
            self._clock.turn(self._before)


_here = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the time of a rank went, in seconds: `start` until it could claim its first segment; then `lanes` threads,
    all together, reading the base, loading what changes it, computing, measuring what is left of a change, checksums,
    writing, and waiting, for work or for the end; at the same time others read back for digests, and made files durable
    (`fsync`). `publish` is what came after, on rank 0. Raises ValueError for what no clock shows."""

    lanes: int
    start: float
    read: float
    load: float
    compute: float
    measure: float
    hash: float
    write: float
    wait: float
    digest: float
    fsync: float
    publish: float

    def __post_init__(self) -> None:
        if not all(0 <= getattr(self, field.name) < 1e12 for field in fields(self)):
            raise ValueError("a time that no clock shows")


def profile_of(lanes: list[Clock], others: list[Clock], *, start: float, seconds: float) -> Profile:
    """The profile of a rank whose lanes were there for `seconds`, once their threads are through."""

    def total(clocks: list[Clock], step: Step) -> float:
        return round(sum(clock.seconds.get(step, 0.0) for clock in clocks), 6)

    steps: tuple[Step, ...] = ("read", "load", "compute", "measure", "hash", "write")
    spent = {step: total(lanes, step) for step in steps}
    wait = round(max(0.0, len(lanes) * seconds - sum(spent.values())), 6)
    return Profile(
        lanes=len(lanes),
        start=round(max(0.0, start), 6),
        wait=wait,
        digest=total(others, "digest"),
        fsync=total(others, "fsync"),
        publish=0.0,
        **{str(step): value for step, value in spent.items()},
    )


def process_start() -> float:
    """When this process began, in Unix seconds; now, where the system does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
