"""The journals of a run, one a process: a line for each segment and file that is finished, and how they are believed.

Whoever can write into the work folder can write a journal. A line counts only if it fits the plan; what it says of
bytes is held against the bytes themselves before it is used (`share`, `follower`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distmerge.errors import InputError
from distmerge.layout import Piece
from distmerge.plan import Plan
from distmerge.storage.checksums import HEX_DIGITS
from distmerge.storage.files import close, fsync_dir, io_errors, pieces_of
from distmerge.storage.records import decode
from distmerge.stream import PieceRecord, SegmentRecord

_MAX_LINE_NBYTES = 64 << 20  # a segment of a hundred thousand small tensors takes a third of it
_SMALLEST, _LARGEST = 1e-118, 1e114  # of sums of squares of float32 values, with much to spare


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A weight file that is whole, durable and under its final name. If it was read back, with the CRC-32s of its
    segments and, where the plan names a kind that needs it, its digest in hex; otherwise these are empty."""

    file: int
    nbytes: int
    digest: str
    segment_crc32s: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What earlier runs finished, by segment and by file number."""

    segments: dict[int, SegmentRecord]
    shards: dict[int, ShardRecord]


class Journal:
    """A new file in `folder`, made with its first line; several threads may append to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._fd: int | None = None

    def append(self, line: bytes, *, durable: bool) -> None:
        """Adds a line; a `durable` one is on disk when this returns, with all before it. Raises MachineError."""
        with self._lock, io_errors(self._folder):
            if self._fd is None:
                path = self._folder / f"{os.getpid()}-{secrets.token_hex(4)}.jsonl"
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
                fsync_dir(self._folder)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            if durable:
                os.fsync(self._fd)

    def close(self) -> None:
        """Ends it; the next line makes a new file. Raises MachineError."""
        fd, self._fd = self._fd, None
        if fd is not None:
            close(fd, self._folder)


def read_journals(folder: Path, plan: Plan) -> Done:
    """What the journals in `folder` say is finished under this very plan. Torn, foreign and forged lines count for
    nothing, and neither do whole files that were read back with other bytes than their segments have."""
    found = Done(segments={}, shards={})
    shards: list[ShardRecord] = []
    for line in _lines(folder):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            if entry["plan"] != plan.digest:
                continue
            if "segment" in entry:
                segment: SegmentRecord = decode(SegmentRecord, entry["segment"])
                if _fits(plan, segment):
                    found.segments[segment.segment] = segment
            else:
                shards.append(decode(ShardRecord, entry["shard"]))
    found.shards.update({shard.file: shard for shard in shards if _agrees(plan, shard, found.segments)})
    return found


def _lines(folder: Path) -> Iterator[bytes]:
    """The lines of all journals, read in pieces; what is no regular file holds none, and longer ones are no lines."""
    for journal in sorted(folder.glob("*.jsonl")):
        line = bytearray()
        with contextlib.suppress(InputError):
            for piece in pieces_of(journal):
                first, *others = bytes(piece).split(b"\n")
                line += first
                for other in others:
                    yield bytes(line)
                    line = bytearray(other)
                if len(line) > _MAX_LINE_NBYTES:
                    break
            else:
                yield bytes(line)


def _fits(plan: Plan, record: SegmentRecord) -> bool:
    """True if the record is one of a segment that the plan has, with pieces that were done as it says."""
    if not 0 <= record.segment < len(plan.segments) or (record.crc32 is None) != (plan.file_digest == "none"):
        return False
    pieces = plan.segments[record.segment].pieces
    return len(pieces) == len(record.pieces) and all(map(_is_done, [plan] * len(pieces), pieces, record.pieces))


def _is_done(plan: Plan, piece: Piece, done: PieceRecord) -> bool:
    task = plan.tasks[piece.task]
    planned = (piece.task, task.numel_of(piece.first, piece.last), task.applied_of(piece.first, piece.last))
    sums, norms, squares = done.sums, [*done.delta_squared, *done.singular], []
    if sums is not None:
        squares = [sums.base_squared, sums.delta_squared, sums.applied_squared, abs(sums.product)]
        squares += [sums.largest_delta * abs(sums.largest_delta)]
        squares += [one or 0.0 for one in (sums.quant_squared, sums.pack_squared, sums.plain_pack_squared)]
    return (
        planned == (done.task, done.numel, done.changed)
        and len(done.delta_squared) == len(task.changes)
        and (sums is None or (sums.numel == done.numel and 0 <= sums.unchanged <= sums.numel))
        and 0 <= done.not_finite <= done.numel
        and all(0 <= value < _LARGEST for value in norms)
        and all(value == 0 or _SMALLEST < value < _LARGEST for value in squares)
    )


def _agrees(plan: Plan, shard: ShardRecord, segments: dict[int, SegmentRecord]) -> bool:
    """True if the record of a whole file is of one that the plan has, and of the bytes that its segments have."""
    if not 0 <= shard.file < len(plan.files) or shard.nbytes != plan.files[shard.file].nbytes:
        return False
    if (
        not re.fullmatch("[0-9a-f]*", shard.digest)
        or len(shard.digest) != plan.reads_back * HEX_DIGITS[plan.file_digest]
    ):
        return False
    numbers = plan.segments_of(shard.file) if plan.reads_back or shard.segment_crc32s else []
    known = (segments[number].crc32 if number in segments else None for number in numbers)
    return (*known,) == shard.segment_crc32s
