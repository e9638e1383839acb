"""Where the time of a run went, rank by rank, as rows for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from distmerge.clock import Profile
from distmerge.runlog import RankLog

HEAD = ("rank", "lanes", *(field.name for field in fields(Profile) if field.name != "lanes"))
_RATED = ("read", "load", "compute", "measure", "hash", "write", "digest", "fsync")


def profile_rows(logs: Sequence[RankLog]) -> list[tuple[str, ...]]:
    """A row for each rank that told where its time went, under HEAD, in seconds; then their sums, of `start` and
    `publish` the longest, and how many GB of output that is a second of each step. No rows where none told."""
    told = [(log, log.profile) for log in logs if log.profile is not None]
    if not told:
        return []
    profiles = [profile for _, profile in told]
    # Ranks start at the same time, and only one publishes.
    add = {name: max if name in ("start", "publish") else sum for name in HEAD[2:]}
    sums = {name: add[name](getattr(profile, name) for profile in profiles) for name in HEAD[2:]}
    lanes, nbytes = sum(profile.lanes for profile in profiles), sum(log.nbytes for log, _ in told)
    rates = {name: f"{nbytes / 1e9 / sums[name]:.2f}" for name in _RATED if sums[name] > 0 and nbytes}
    return [
        *(_row(str(log.rank), one.lanes, {name: getattr(one, name) for name in HEAD[2:]}) for log, one in told),
        _row("all", lanes, sums),
        ("GB/s", "", *(rates.get(name, "") for name in HEAD[2:])),
    ]


def profile_table(logs: Sequence[RankLog]) -> list[str]:
    """The same as lines of text."""
    rows = [HEAD, *profile_rows(logs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return ["profile  seconds of each step, over all lanes of a rank, and GB of output a second of it", *lines]


def _row(name: str, lanes: int, seconds: dict[str, float]) -> tuple[str, ...]:
    return (name, str(lanes), *(f"{seconds[column]:.2f}" for column in HEAD[2:]))
