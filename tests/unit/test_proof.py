"""The proof before publishing: every record that is not the plan's is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from distmerge.errors import VerifyError
from distmerge.journal import ShardRecord
from distmerge.layout import pack_shards
from distmerge.plan import Plan
from distmerge.stream import PieceRecord, SegmentRecord
from distmerge.verify import check_records
from tests.factories import plan_of, wanted


@pytest.fixture
def plan() -> Plan:
    """Two files; the first has a tensor that is long enough for several segments, and an empty one."""
    tensors = [wanted("long", (60_000, 1000), r=2), wanted("empty", (0, 5)), wanted("plain", (30, 20))]
    found = plan_of(pack_shards([*tensors, wanted("last", (40, 30), r=4)], 120_001_200))
    assert len(found.files) == 2
    assert len(found.segments) > 3
    return found


def honest(plan: Plan) -> tuple[list[SegmentRecord], list[ShardRecord]]:
    """The records of a run that did what was planned."""
    segments = []
    for number, segment in enumerate(plan.segments):
        pieces = []
        for piece in segment.pieces:
            task = plan.tasks[piece.task]
            numel = task.block(piece.last - 1)[1] - task.block(piece.first)[0] if piece.last else 0
            pieces.append(
                PieceRecord(
                    task=piece.task,
                    numel=numel,
                    changed=(numel,) * len(task.changes),
                    delta_squared=(1.0,) * len(task.changes),
                    sums=None,
                    singular=(),
                    not_finite=0,
                )
            )
        segments.append(SegmentRecord(segment=number, crc32=0, pieces=tuple(pieces)))
    shards = [
        ShardRecord(
            file=number,
            nbytes=file.nbytes,
            digest="",
            segment_crc32s=tuple(segments[segment].crc32 for segment in plan.segments_of(number)),
        )
        for number, file in enumerate(plan.files)
    ]
    return segments, shards


def piece(segments: list[SegmentRecord], number: int, **changes: Any) -> list[SegmentRecord]:
    """`segments` with the first piece of one of them changed."""
    pieces = segments[number].pieces
    changed = replace(segments[number], pieces=(replace(pieces[0], **changes), *pieces[1:]))
    return [*segments[:number], changed, *segments[number + 1 :]]


def test_the_records_of_an_honest_run_are_accepted_in_any_order(plan: Plan) -> None:
    segments, shards = honest(plan)
    check_records(plan, segments, shards)
    check_records(plan, segments[::-1], shards[::-1])


Change = Callable[[list[SegmentRecord]], list[SegmentRecord]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s[1:], "1 segments were not done: '0'"),
        (lambda s: s[:-1], "segments were not done"),
        (lambda s: [*s, s[1]], "1 segments were done twice: '1'"),
        (lambda s: [s[0], *s[:1], *s[2:]], "1 segments were not done: '1'"),
        (lambda s: [*s, replace(s[0], segment=99)], "done twice: '99'"),
        (lambda s: [*s, replace(s[0], segment=-1)], "done twice: '-1'"),
        (lambda s: piece(s, 0, changed=()), "'long'"),
        (lambda s: piece(s, 1, changed=(s[1].pieces[0].numel - 1,)), "'long'"),
        (lambda s: piece(s, 0, numel=s[0].pieces[0].numel - 1), "'long'"),
        (lambda s: piece(s, 0, numel=s[0].pieces[0].numel + 1), "'long'"),
        (lambda s: piece(s, 0, numel=0), "'long'"),
        (lambda s: piece(piece(s, 0, changed=(0,)), 1, changed=(2 * s[1].pieces[0].numel,)), "'long'"),
        (lambda s: piece(piece(s, 0, numel=s[0].pieces[0].numel - 1), 1, numel=s[1].pieces[0].numel + 1), "'long'"),
        (lambda s: piece(s, 0, task=1), "did other tensors"),
        (lambda s: [replace(s[0], pieces=()), *s[1:]], "did other tensors"),
        (lambda s: [replace(s[0], pieces=s[0].pieces * 2), *s[1:]], "did other tensors"),
    ],
)
def test_records_must_cover_the_plan_exactly_once(plan: Plan, change: Change, named: str) -> None:
    segments, shards = honest(plan)
    with pytest.raises(VerifyError, match=named):
        check_records(plan, change(segments), shards)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s[:1], "1 weight files were not done: '1'"),
        (lambda s: [], "2 weight files were not done"),
        (lambda s: [*s, s[0]], "1 weight files were done twice: '0'"),
        (lambda s: [*s, replace(s[0], file=7)], "done twice: '7'"),
        (lambda s: [replace(s[0], nbytes=s[0].nbytes - 1), s[1]], "bytes"),
    ],
)
def test_a_weight_file_that_is_missing_or_double_is_refused(plan: Plan, change: Any, named: str) -> None:
    segments, shards = honest(plan)
    with pytest.raises(VerifyError, match=named):
        check_records(plan, segments, change(shards))


def test_an_adapter_tensor_that_the_plan_forgot_is_refused(plan: Plan) -> None:
    more = replace(plan, adapters=(replace(plan.adapters[0], num_tensors=6),))
    with pytest.raises(VerifyError, match="4 tensors were applied, the adapter holds 6"):
        check_records(more, *honest(plan))


def test_bytes_that_are_read_back_other_than_written_are_refused(plan: Plan) -> None:
    segments, shards = honest(plan)
    first = shards[0].segment_crc32s
    shards[0] = replace(shards[0], segment_crc32s=(first[0] ^ 1, *first[1:]))
    with pytest.raises(VerifyError, match="read back with other bytes"):
        check_records(plan, segments, shards)
