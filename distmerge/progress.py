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

    def line(self) -> str:
        """`merging  1.2 of 3.4 GB (35 %)  0.85 GB/s  ETA 0:03`."""
        share = 100 * self.nbytes / self.nbytes_total if self.nbytes_total else 100.0
        eta = "" if self.eta_seconds is None else f"  ETA {clock(self.eta_seconds)}"
        done, total = gigabytes(self.nbytes), gigabytes(self.nbytes_total)
        return f"merging  {done} of {total} ({share:.0f} %)  {self.rate / 1e9:.2f} GB/s{eta}"


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
                print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def watching(
        self, reports: Callable[[], list[dict[str, Any]]], nbytes_total: int, record: Callable[[Snapshot], None]
    ) -> Iterator[None]:
        """In the body, shows what `reports` says of the ranks, and gives every snapshot to `record`."""
        if self._quiet:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(
            target=self._watch, args=(reports, nbytes_total, record, over), name="display", daemon=True
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
    ) -> None:
        started = time.monotonic()
        show = self._live() if self.interactive else self._lines()
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
    def _lines(self) -> Iterator[Callable[[Snapshot], None]]:
        shown = time.monotonic()

        def update(snapshot: Snapshot) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _LINE_SECONDS:
                shown = time.monotonic()
                self.say(snapshot.line())

        yield update

    @contextlib.contextmanager
    def _live(self) -> Iterator[Callable[[Snapshot], None]]:
        from rich.console import Console, Group  # not needed without a terminal
        from rich.live import Live
        from rich.text import Text

        console = Console(file=self._stream)
        with Live(console=console, refresh_per_second=4, transient=True) as live:

            def update(snapshot: Snapshot) -> None:
                rows = [
                    Text(f"  rank {rank}  {gigabytes(nbytes):>9}  {doing}", style="dim", overflow="ellipsis")
                    for rank, (nbytes, doing) in enumerate(snapshot.ranks[: max(1, console.height - 4)])
                ]
                filled = _BAR_WIDTH * snapshot.nbytes // max(1, snapshot.nbytes_total)
                bar = Text("━" * filled, style="cyan") + Text("─" * (_BAR_WIDTH - filled), style="dim")
                live.update(Group(Text(snapshot.line()), bar, *rows))

            yield update


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
