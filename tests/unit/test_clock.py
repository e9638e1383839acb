"""Clocks: every second of a thread belongs to exactly one step."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from distmerge.clock import Clock, Profile, during, process_start, profile_of
from distmerge.report.profile import HEAD, profile_rows, profile_table
from distmerge.runlog import RankLog, Span


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that clocks see, to be set by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_step_inside_of_another_interrupts_it(tick: list[float]) -> None:
    with Clock() as clock:
        tick[0] += 1
        with during("compute"):
            tick[0] += 2
            with during("read"):
                tick[0] += 4
            tick[0] += 8
        tick[0] += 16
    assert clock.seconds == {"idle": 17, "compute": 10, "read": 4}


def test_a_step_that_fails_ends(tick: list[float]) -> None:
    with Clock() as clock:
        with contextlib.suppress(ValueError), during("compute"), during("write"):
            tick[0] += 1
            raise ValueError
        tick[0] += 2
    assert clock.seconds["write"] == 1
    assert clock.seconds["idle"] == 2
    assert clock.seconds["compute"] == 0


def test_a_clock_goes_on_where_it_stopped(tick: list[float]) -> None:
    clock = Clock()
    for _ in range(2):
        with clock, during("read"):
            tick[0] += 1
        tick[0] += 10  # nobody looks
    assert clock.seconds["read"] == 2


def test_a_thread_without_a_clock_counts_nowhere(tick: list[float]) -> None:
    with Clock() as clock:

        def other() -> None:
            with during("read"):
                tick[0] += 1

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    with during("read"):
        tick[0] += 1
    assert clock.seconds == {"idle": 1}


def test_the_steps_of_the_lanes_and_their_waiting_are_all_of_their_time() -> None:
    lanes = [Clock(), Clock()]
    lanes[0].seconds = {"read": 1.0, "compute": 2.0, "idle": 9.0}
    lanes[1].seconds = {"read": 0.5, "write": 1.5, "load": 0.25, "measure": 0.25, "hash": 0.5}
    other = Clock()
    other.seconds = {"digest": 3.0, "fsync": 1.0, "idle": 2.0}
    made = profile_of(lanes, [other], start=2.0, seconds=5.0)
    assert made == Profile(
        lanes=2,
        start=2.0,
        read=1.5,
        load=0.25,
        compute=2.0,
        measure=0.25,
        hash=0.5,
        write=1.5,
        wait=4.0,  # 2 * 5 - 6
        digest=3.0,
        fsync=1.0,
        publish=0.0,
    )


def log(rank: int, made: Profile | None) -> RankLog:
    span = Span(segment=rank, start=1.0, end=2.0, nbytes=2_000_000_000, kept=False)
    return RankLog(rank=rank, host="h", device="cpu", start=1.0, end=9.0, spans=(span,), profile=made)


def test_the_table_has_ranks_sums_and_rates() -> None:
    clock = Clock()
    clock.seconds = {"read": 0.5, "digest": 1.0}
    one = profile_of([clock], [clock], start=2.0, seconds=4.0)
    two = profile_of([clock], [], start=3.0, seconds=4.0)
    rows = [dict(zip(HEAD, row, strict=True)) for row in profile_rows([log(0, one), log(1, two), log(2, None)])]
    assert [row["rank"] for row in rows] == ["0", "1", "all", "GB/s"]
    assert [row["read"] for row in rows] == ["0.50", "0.50", "1.00", "4.00"]
    assert [row["start"] for row in rows] == ["2.00", "3.00", "3.00", ""]
    assert [row["wait"] for row in rows] == ["3.50", "3.50", "7.00", ""]
    assert [row["digest"] for row in rows] == ["1.00", "0.00", "1.00", "4.00"]
    lines = profile_table([log(0, one)])
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[1].split() == list(HEAD)
    assert profile_rows([log(0, None)]) == []


def test_this_process_began_before_now_and_after_the_machine() -> None:
    assert time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) <= process_start() <= time.time() + 0.05
