"""The run log: which rank did what when, a line of JSON for each. It is asked for, and no part of the output, whose
bytes must not depend on ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from distmerge.clock import Profile
from distmerge.config import MergeConfig
from distmerge.errors import InputError, printable
from distmerge.storage.files import read_input, replace_file
from distmerge.storage.records import decode, encode

_MAX_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A segment that a rank did from `start` to `end`, in Unix seconds: `nbytes` written or, if it was `kept` from an
    earlier run, read. Raises ValueError for times that no clock shows."""

    segment: int
    start: float
    end: float
    nbytes: int
    kept: bool

    def __post_init__(self) -> None:
        _check_times(self.start, self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLog:
    """What a rank did from `start` to `end`, in Unix seconds; its spans come one after another; where its time went, if
    the log is not of a distmerge that did not tell. Raises ValueError for times that no clock shows."""

    rank: int
    host: str
    device: str
    start: float
    end: float
    spans: tuple[Span, ...]
    profile: Profile | None = None

    def __post_init__(self) -> None:
        _check_times(self.start, self.end)

    def published_in(self, seconds: float) -> RankLog:
        """The log of the rank that published in that many seconds, after all the others had ended."""
        return replace(self, profile=self.profile and replace(self.profile, publish=round(seconds, 6)))

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def busy_seconds(self) -> float:
        """Seconds spent on segments; the rest is waiting, and making files durable."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


def _check_times(start: float, end: float) -> None:
    if not 0 <= start <= end < 1e12:
        raise ValueError(f"a time from {start} to {end}")


def check_run_log(config: MergeConfig) -> None:
    """Raises InputError if the run log cannot be written where `config` says, or would lie in an input or output."""
    path = config.run_log
    if path is None:
        return
    where = f"--run-log {printable(str(path))}"
    if path.is_dir() or not path.parent.is_dir():
        raise InputError("is a folder" if path.is_dir() else "its folder is not there", where=where)
    place = path.parent.resolve() / path.name
    for what, folder in (
        ("output", config.output),
        ("base", config.base),
        *(("adapter", adapter.home) for adapter in config.all_adapters),
    ):
        if folder.resolve() in (place, *place.parents):
            raise InputError(f"lies in the {what} {folder}", where=where, hint="choose a place beside it")


def write_run_log(path: Path, logs: list[RankLog]) -> None:
    """Replaces the file at `path`: a line for each rank, with what its spans add up to. Raises MachineError."""
    lines = []
    for log in logs:
        sums = {"seconds": round(log.seconds, 3), "busy_seconds": round(log.busy_seconds, 3)}
        counts = {"segments": len(log.spans), "nbytes": log.nbytes}
        lines.append(json.dumps({**json.loads(encode(log)), **sums, **counts}))
    replace_file(path, ("\n".join(lines) + "\n").encode())


def read_run_log(path: Path) -> tuple[RankLog, ...]:
    """The logs of all ranks in the file at `path`. Raises InputError for anything else."""
    logs = []
    for number, line in enumerate(read_input(path, _MAX_NBYTES).splitlines(), start=1):
        try:
            values = json.loads(line)
            fields = {name: values[name] for name in RankLog.__slots__ if name != "profile"}
            logs.append(decode(RankLog, {**fields, "profile": values.get("profile")}))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"line {number} is no rank of a run log ({printable(str(error), 80)})"
            raise InputError(what, where=str(path)) from None
    if not logs:
        raise InputError("holds no ranks", where=str(path))
    return tuple(logs)
