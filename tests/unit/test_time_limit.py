"""The limit of patterns in a program of others: it counts the matching alone, and gives their timer back."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from distmerge.adapter import patterns
from distmerge.adapter.patterns import matched, time_limit
from distmerge.errors import InputError


@pytest.fixture
def profiler() -> Iterator[None]:
    """A profiler that samples by the timer that the limit uses."""
    before = signal.signal(signal.SIGPROF, lambda *_: None)
    signal.setitimer(signal.ITIMER_PROF, 500, 70)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def test_what_other_threads_compute_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    over, data = threading.Event(), bytes(1 << 20)

    def compute() -> None:
        while not over.is_set():
            hashlib.sha256(data)

    other = threading.Thread(target=compute)
    other.start()
    try:
        with time_limit("here"):
            since = time.process_time()
            while time.process_time() - since < 0.5:
                time.sleep(0.02)
            assert matched("match", "a(?P<x>.)", "abc") == {"x": "b"}
        with pytest.raises(InputError, match="CPU time"), time_limit("here"):
            matched("match", "((.*)*)*z", "x" * 100)
    finally:
        over.set()
        other.join()


def test_a_timer_of_the_program_goes_on(profiler: None) -> None:
    with time_limit("here"), time_limit("inside"):
        pass
    left, interval = signal.getitimer(signal.ITIMER_PROF)
    assert left > 400
    assert interval == pytest.approx(70)


def test_a_handler_that_is_not_pythons_is_left_where_it_is(monkeypatch: pytest.MonkeyPatch, profiler: None) -> None:
    handler = signal.getsignal(signal.SIGPROF)
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    with time_limit("here"):
        assert matched("fullmatch", "a(?P<x>.)", "ab") == {"x": "b"}
        assert signal.signal(signal.SIGPROF, handler) is handler
