"""The proof before publishing: what was done is what was planned, each thing exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from distmerge.checkpoint.header import read_header
from distmerge.errors import FAILED_STORAGE, InputError, MachineError, VerifyError, listing
from distmerge.input_files import InputRecord
from distmerge.journal import ShardRecord
from distmerge.lanes import memory_errors
from distmerge.plan import Plan
from distmerge.storage.files import begins_with
from distmerge.stream import SegmentRecord


def check_records(plan: Plan, segments: Sequence[SegmentRecord], shards: Sequence[ShardRecord]) -> None:
    """Holds the records of all ranks against the plan. Raises VerifyError, naming what is missing or was done twice.

    - every segment and every weight file is recorded exactly once;
    - every output tensor has each of its elements written exactly once;
    - every adapter tensor was added to each element of its output tensor exactly once.
    """
    _exactly_once("segments", Counter(record.segment for record in segments), len(plan.segments))
    _exactly_once("weight files", Counter(shard.file for shard in shards), len(plan.files))
    for shard in shards:
        if shard.nbytes != (planned_nbytes := plan.files[shard.file].nbytes):
            raise VerifyError(
                f"has {shard.nbytes} bytes, planned were {planned_nbytes}", where=plan.files[shard.file].name
            )
        if not plan.reads_back and not shard.segment_crc32s:
            continue
        read_back = dict(zip(plan.segments_of(shard.file), shard.segment_crc32s, strict=True))
        if lost := [record for record in segments if read_back.get(record.segment, record.crc32) != record.crc32]:
            raise lost_bytes(len(lost), plan.files[shard.file].name)
    wrong = []
    for record in segments:
        pieces = plan.segments[record.segment].pieces
        if [piece.task for piece in pieces] != [piece.task for piece in record.pieces]:
            raise VerifyError(f"segment {record.segment} did other tensors than planned")
        for piece, done in zip(pieces, record.pieces, strict=True):
            task = plan.tasks[piece.task]
            if (done.numel, done.changed) != (
                task.numel_of(piece.first, piece.last),
                task.applied_of(piece.first, piece.last),
            ):
                wrong.append(task.name)
    if wrong:
        raise VerifyError(f"{len(wrong)} tensors were not written or merged exactly once: {listing(wrong)}")
    for number, adapter in enumerate(plan.adapters):
        applied = sum(owner == number for owner, _ in plan.adapter_keys)
        if applied != adapter.num_tensors:
            raise VerifyError(
                f"{applied} tensors were applied, the adapter holds {adapter.num_tensors}", where=adapter.name
            )


def check_inputs(names: Iterable[str], records: Sequence[InputRecord]) -> None:
    """Raises VerifyError unless each of the inputs `names` was hashed exactly once."""
    wanted, found = Counter([*names]), Counter(record.name for record in records)
    if wrong := sorted((wanted - found) + (found - wanted)):
        raise VerifyError(f"{len(wrong)} inputs were not hashed exactly once: {listing(wrong)}")


def lost_bytes(num_segments: int, where: str) -> VerifyError:
    """That `num_segments` segments of a file are not what was written."""
    return VerifyError(
        f"{num_segments} segments were read back with other bytes than were written",
        where=where,
        hint=FAILED_STORAGE,
    )


def check_headers(plan: Plan, folder: Path) -> None:
    """Reads the headers on disk, ours and by the safetensors library, and holds them against the plan."""
    from safetensors import SafetensorError, safe_open

    for number, file in enumerate(plan.files):
        path = folder / file.name
        planned = {}
        for task in plan.tasks_of(number):
            begin = task.begin
            for part in task.parts:
                planned[part.name] = (part.dtype, part.shape, begin)
                begin += part.nbytes
        try:
            found = {spec.name: (spec.dtype, spec.shape, spec.begin) for spec in read_header(path).tensors}
        except InputError as error:
            raise VerifyError(f"the header on disk is not the planned one ({error.what})", where=str(path)) from None
        if planned != found or not begins_with(path, plan.header_of(number)):
            raise VerifyError("the header on disk is not the planned one", where=str(path))
        try:
            with memory_errors(), safe_open(path, framework="np") as opened:  # torch would map the file once more
                names = set(opened.keys())
        except SafetensorError as error:
            raise VerifyError(f"the safetensors library refuses it ({error})", where=str(path)) from None
        except OSError:  # whose words are not to be trusted: any cause is a file that is not there
            raise MachineError(
                "the safetensors library cannot open it", where=str(path), hint="run the same command again"
            ) from None
        if names != planned.keys():
            raise VerifyError("the safetensors library reads other tensors than planned", where=str(path))


def _exactly_once(what: str, counts: Counter[int], expected: int) -> None:
    missing = [str(number) for number in range(expected) if not counts[number]]
    twice = [str(number) for number, count in counts.items() if count > 1 or not 0 <= number < expected]
    if missing:
        raise VerifyError(f"{len(missing)} {what} were not done: {listing(missing)}", hint="run the same command again")
    if twice:
        raise VerifyError(f"{len(twice)} {what} were done twice: {listing(twice)}", hint="run the same command again")
