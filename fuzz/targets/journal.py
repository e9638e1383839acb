"""A journal of finished work, forged: what is taken of it fits the plan, piece by piece, and can be put in a ledger."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import VerifyError
from distmerge.plan import Plan, make_plan
from distmerge.receipt import FileEntry, build_ledger, build_tensors
from distmerge.verify import check_records
from distmerge.work import WorkFolder
from fuzz.law import scratch, taken
from fuzz.mutate import mutated
from fuzz.scenes import write_scene


@functools.cache
def _plan() -> tuple[Plan, WorkFolder, Path]:
    base, adapter = write_scene(scratch() / "journal")
    output = scratch() / "journal" / "out"
    plan = make_plan(MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output), "cpu")
    work = WorkFolder(output)
    done = work.path / "done"
    done.mkdir(parents=True)
    return plan, work, done / "x.jsonl"


def one(data: bytes) -> bool:
    plan, work, path = _plan()
    path.write_bytes(data.replace(b"PLAN", plan.digest.encode()))  # who writes into the folder knows the digest
    done = work.done(plan)
    for record in done.segments.values():
        assert [piece.task for piece in record.pieces] == [p.task for p in plan.segments[record.segment].pieces]
    for shard in done.shards.values():
        FileEntry(kind="sha256", digest=shard.digest, bytes=shard.nbytes)
    segments = tuple(done.segments.values())
    taken(lambda: check_records(plan, segments, tuple(done.shards.values())), error=VerifyError, where=False)
    ledger, tensors = build_ledger(plan, segments), build_tensors(plan, segments)
    json.dumps([str(ledger), str(tensors)], allow_nan=False)
    return bool(segments or done.shards)


def changed(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\n")
    place = chance.randrange(len(lines))
    lines[place] = mutated(lines[place], chance) if chance.random() < 0.9 else lines[place] * 2
    return b"\n".join(lines)
