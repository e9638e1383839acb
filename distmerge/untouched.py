"""Ranges of the output that are the same bytes as a range of an input: where they lie in both. Integers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distmerge.layout import Piece, Task
from distmerge.plan import Plan
from distmerge.storage.sharing import BLOCK_NBYTES, whole_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Untouched:
    """`nbytes` bytes from byte `begin` of an output file on, which are those from byte `source` on of `file` of the
    base's folder, `origin` 0, or of that of adapter number `origin`. `pieces` are the numbers of the pieces that they
    are in a list of such."""

    pieces: range
    origin: int
    file: str
    source: int
    begin: int
    nbytes: int


def untouched(tasks: Sequence[Task], pieces: Iterable[Piece]) -> Iterator[Untouched]:
    """The untouched ranges of `pieces`, which follow one another in one output file; those that follow one another in
    the input too are one."""
    found: Untouched | None = None
    for number, piece in enumerate(pieces):
        task = tasks[piece.task]
        if task.kind != "copy" or piece.first == piece.last:
            continue
        own = _range(task, piece, number)
        if found is not None and _follows(found, own):
            own = _joined(found, own)
        elif found is not None:
            yield found
        found = own
    if found is not None:
        yield found


def spans_to_reserve(plan: Plan, file: int) -> list[tuple[int, int]]:
    """The bytes [first, last) of an output file that it shares with no input wherever that is possible at all, in
    order."""
    tasks = plan.tasks_of(file)
    wholes = [Piece(task=number, first=0, last=task.num_blocks) for number, task in enumerate(tasks)]
    spans, begin = [], 0
    for one in untouched(tasks, wholes):
        first, last = whole_blocks(one.begin, one.nbytes)
        if last > first and not (one.source - one.begin) % BLOCK_NBYTES:
            spans.append((begin, first))
            begin = last
    return [(first, last) for first, last in [*spans, (begin, plan.files[file].nbytes)] if last > first]


def _range(task: Task, piece: Piece, number: int) -> Untouched:
    offset = task.block_begin(piece.first)
    return Untouched(
        pieces=range(number, number + 1),
        origin=task.origin,
        file=task.source.data.file,
        source=task.source.data.begin + offset,
        begin=task.begin + offset,
        nbytes=task.nbytes_of(piece.first, piece.last),
    )


def _follows(one: Untouched, other: Untouched) -> bool:
    same = (one.origin, one.file) == (other.origin, other.file)
    return same and (one.source + one.nbytes, one.begin + one.nbytes) == (other.source, other.begin)


def _joined(one: Untouched, other: Untouched) -> Untouched:
    return Untouched(
        pieces=range(one.pieces.start, other.pieces.stop),
        origin=one.origin,
        file=one.file,
        source=one.source,
        begin=one.begin,
        nbytes=one.nbytes + other.nbytes,
    )
