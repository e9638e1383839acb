"""What a run shows while it works: one live display on a terminal, plain lines anywhere else, on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from distmerge.errors import DistmergeError
from distmerge.redaction import redacted

_REFRESH_SECONDS = 0.5
_LINE_SECONDS = 10.0
_BAR_WIDTH = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where a run is: bytes of the output done and planned, seconds since the start, and what each rank does."""

    nbytes: int
    nbytes_total: int
    seconds: float
    ranks: tuple[tuple[int, str], ...]

    @property
    def rate(self) -> float:
        """Bytes a second so far."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        return (self.nbytes_total - self.nbytes) / self.rate if self.nbytes else None

    def line(self, verb: str = "merging", unit: str = "") -> str:
        """`merging  1.2 of 3.4 GB (35 %)  0.85 GB/s  ETA 0:03`; with a `unit`, that is counted and not bytes."""
        share = 100 * self.nbytes / self.nbytes_total if self.nbytes_total else 100.0
        eta = "" if self.eta_seconds is None else f"  ETA {clock(self.eta_seconds)}"
        if unit:
            return f"{verb:8} {self.nbytes} of {self.nbytes_total} {unit} ({share:.0f} %){eta}"
        done, total = gigabytes(self.nbytes), gigabytes(self.nbytes_total)
        return f"{verb:8} {done} of {total} ({share:.0f} %)  {self.rate / 1e9:.2f} GB/s{eta}"


class Counter:
    """How much of some work is done, counted by the threads that do it, and what is being done."""

    def __init__(self) -> None:
        self.done = 0
        self.doing = ""
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self.done += amount


class Display:
    """Shows a run to the person who started it. `quiet` ranks show nothing."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self.interactive = not quiet and self._stream.isatty()

    def say(self, text: str) -> None:
        """One line for people."""
        if not self._quiet:
            with contextlib.suppress(OSError, ValueError):  # nobody listens; never a reason to fail
                print(redacted(text), file=self._stream, flush=True)

    @contextlib.contextmanager
    def counting(self, verb: str, total: int, unit: str = "") -> Iterator[Counter]:
        """In the body, shows how much of `total` bytes, or of another `unit`, the counter has."""
        counter = Counter()

        def reports() -> list[dict[str, Any]]:
            return [{"nbytes": counter.done, "doing": counter.doing}]

        with self.watching(reports, total, lambda _: None, verb=verb, unit=unit):
            yield counter

    @contextlib.contextmanager
    def watching(
        self,
        reports: Callable[[], list[dict[str, Any]]],
        nbytes_total: int,
        record: Callable[[Snapshot], None],
        *,
        verb: str = "merging",
        unit: str = "",
    ) -> Iterator[None]:
        """In the body, shows what `reports` says of the ranks, and gives every snapshot to `record`."""
        if self._quiet:
            yield
            return
        over = threading.Event()
        show = self._live(verb, unit) if self.interactive else self._lines(verb, unit)
        thread = threading.Thread(
            target=self._watch, args=(reports, nbytes_total, record, over, show), name="display", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(
        self,
        reports: Callable[[], list[dict[str, Any]]],
        nbytes_total: int,
        record: Callable[[Snapshot], None],
        over: threading.Event,
        show: contextlib.AbstractContextManager[Callable[[Snapshot], None]],
    ) -> None:
        started = time.monotonic()
        with contextlib.suppress(OSError, ValueError), show as update:
            while True:
                last = over.wait(_REFRESH_SECONDS)
                try:
                    ranks = tuple((int(r.get("nbytes", 0)), str(r.get("doing", "starting"))) for r in reports())
                except DistmergeError:  # the store is gone; the rank itself says so
                    return
                snapshot = Snapshot(
                    nbytes=sum(nbytes for nbytes, _ in ranks),
                    nbytes_total=nbytes_total,
                    seconds=time.monotonic() - started,
                    ranks=ranks,
                )
                record(snapshot)
                update(snapshot)
                if last:
                    return

    @contextlib.contextmanager
    def _lines(self, verb: str, unit: str) -> Iterator[Callable[[Snapshot], None]]:
        shown = time.monotonic()

        def update(snapshot: Snapshot) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _LINE_SECONDS:
                shown = time.monotonic()
                self.say(snapshot.line(verb, unit))

        yield update

    @contextlib.contextmanager
    def _live(self, verb: str, unit: str) -> Iterator[Callable[[Snapshot], None]]:
        from rich.console import Console, Group  # not needed without a terminal
        from rich.live import Live
        from rich.text import Text

        console = Console(file=self._stream)
        with Live(console=console, refresh_per_second=4, transient=True) as live:

            def update(snapshot: Snapshot) -> None:
                rows = [
                    Text(_row(rank, nbytes, doing, verb), style="dim", overflow="ellipsis")
                    for rank, (nbytes, doing) in enumerate(snapshot.ranks[: max(1, console.height - 4)])
                ]
                filled = _BAR_WIDTH * snapshot.nbytes // max(1, snapshot.nbytes_total)
                bar = Text("━" * filled, style="cyan") + Text("─" * (_BAR_WIDTH - filled), style="dim")
                live.update(Group(Text(snapshot.line(verb, unit)), bar, *rows))

            yield update


def _row(rank: int, nbytes: int, doing: str, verb: str) -> str:
    return f"  rank {rank}  {gigabytes(nbytes):>9}  {doing}" if verb == "merging" else f"  {doing}"


def gigabytes(nbytes: float) -> str:
    """`nbytes` for people, in decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def clock(seconds: float) -> str:
    """`seconds` as h:mm:ss, m:ss below an hour, or `1.2 s` below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
