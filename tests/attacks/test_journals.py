"""Journals of a run that somebody else wrote or spoiled: a line counts only if it fits the plan."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import distmerge
from distmerge.journal import ShardRecord
from distmerge.plan import Plan, make_plan
from distmerge.storage.records import encode
from distmerge.stream import PieceRecord, SegmentRecord
from distmerge.work import WorkFolder
from tests.attacks.scene import small_scene


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(small_scene(tmp_path_factory.mktemp("scene")).config(), "cpu")


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    (tmp_path / "out.distmerge" / "done").mkdir(parents=True)
    return WorkFolder(tmp_path / "out")


def honest(plan: Plan) -> SegmentRecord:
    """The record of segment 0 of a run that did all of it."""
    pieces = []
    for piece in plan.segments[0].pieces:
        task = plan.tasks[piece.task]
        applied = task.applied_of(piece.first, piece.last)
        numel, ones = task.numel_of(piece.first, piece.last), (1.0,) * len(applied)
        pieces.append(
            PieceRecord(
                task=piece.task,
                numel=numel,
                changed=applied,
                delta_squared=ones,
                sums=None,
                singular=ones,
                not_finite=0,
            )
        )
    return SegmentRecord(segment=0, crc32=7, pieces=tuple(pieces))


def note(work: WorkFolder, plan: Plan, **record: Any) -> None:
    line = encode({"plan": plan.digest, **record})
    (work.path / "done" / "x.jsonl").write_text(line + "\n")


def changed(record: SegmentRecord, **fields: Any) -> SegmentRecord:
    """`record` with another first piece that has changes."""
    at = next(n for n, piece in enumerate(record.pieces) if piece.changed)
    piece = replace(record.pieces[at], **fields)
    return replace(record, pieces=(*record.pieces[:at], piece, *record.pieces[at + 1 :]))


def test_a_record_that_fits_counts(plan: Plan, work: WorkFolder) -> None:
    note(work, plan, segment=honest(plan))
    assert work.done(plan).segments == {0: honest(plan)}


FORGED: dict[str, Callable[[SegmentRecord], SegmentRecord]] = {
    "a segment that is not": lambda record: replace(record, segment=99),
    "a negative segment": lambda record: replace(record, segment=-1),
    "no checksum": lambda record: replace(record, crc32=None),
    "no pieces": lambda record: replace(record, pieces=()),
    "a piece twice": lambda record: replace(record, pieces=(*record.pieces, record.pieces[0])),
    "another tensor": lambda record: changed(record, task=99),
    "fewer elements": lambda record: changed(record, numel=1),
    "a change not made": lambda record: changed(record, changed=(0,)),
    "no norms": lambda record: changed(record, delta_squared=()),
    "a norm of NaN": lambda record: changed(record, delta_squared=(float("nan"),)),
    "an endless norm": lambda record: changed(record, delta_squared=(float("inf"),)),
    "a negative norm": lambda record: changed(record, delta_squared=(-1.0,)),
    "an endless singular value": lambda record: changed(record, singular=(1e200,)),
    "more that is not finite than there is": lambda record: changed(record, not_finite=1 << 40),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_record_that_no_run_of_the_plan_writes_counts_for_nothing(what: str, plan: Plan, work: WorkFolder) -> None:
    note(work, plan, segment=FORGED[what](honest(plan)))
    assert work.done(plan).segments == {}


@pytest.mark.parametrize("digest", ["", "ab", "x" * 64, "A" * 64, "../" * 21 + "a", "0" * 65])
def test_a_digest_that_is_none_is_not_believed(digest: str, plan: Plan, work: WorkFolder) -> None:
    whole = ShardRecord(file=0, nbytes=plan.files[0].nbytes, digest="0" * 64, segment_crc32s=(7,))
    lines = [{"plan": plan.digest, "segment": honest(plan)}, {"plan": plan.digest, "shard": whole}]
    journal = work.path / "done" / "x.jsonl"
    journal.write_text("\n".join(map(encode, lines)))
    assert work.done(plan).shards == {0: whole}
    lines[1] = {"plan": plan.digest, "shard": replace(whole, digest=digest)}
    journal.write_text("\n".join(map(encode, lines)))
    assert work.done(plan).shards == {}


@pytest.mark.timeout(20)
def test_a_journal_that_is_no_file_or_has_a_line_without_end_holds_nothing(
    plan: Plan, work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmerge.journal._MAX_LINE_NBYTES", 1 << 20)
    done = work.path / "done"
    os.mkfifo(done / "a.jsonl")
    (done / "b.jsonl").mkdir()
    (done / "c.jsonl").symlink_to("/dev/zero")
    (done / "d.jsonl").touch()
    os.truncate(done / "d.jsonl", 1 << 40)  # takes no room
    note(work, plan, segment=honest(plan))
    assert list(work.done(plan).segments) == [0]


def test_a_forged_journal_ends_in_the_bytes_of_a_merge_without_it(tmp_path: Path) -> None:
    scene = small_scene(tmp_path)
    scene.merge(output=tmp_path / "clean")
    plan = make_plan(scene.config(), "cpu")
    with WorkFolder(scene.output) as work:
        work.open(plan)
        note(work, plan, segment=honest(plan))  # fits, but the bytes are not there
    scene.merge()
    clean = json.loads((tmp_path / "clean" / "merge_receipt.json").read_text())
    assert json.loads((scene.output / "merge_receipt.json").read_text()) == clean
    assert distmerge.verify(scene.output).num_adapter_tensors == 2
