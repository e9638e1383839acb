"""One rank's share of a run: the segments it claims, done anew or kept from an earlier run, and the files it ends."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass

import torch

from distmerge import __version__
from distmerge.adapter.screen import weights_digest
from distmerge.budget import budget_here
from distmerge.clock import profile_of
from distmerge.config import MergeConfig
from distmerge.errors import InputError, MachineError
from distmerge.follower import Followers
from distmerge.input_files import InputHashes, InputRecord
from distmerge.journal import ShardRecord
from distmerge.layout import used_tensors
from distmerge.numerics.compiled import arithmetic
from distmerge.numerics.precision import full_precision
from distmerge.plan import Plan, count_lanes
from distmerge.room import RoomWatch
from distmerge.runlog import RankLog, Span
from distmerge.storage.checksums import require
from distmerge.storage.records import decode_rows, encode_rows
from distmerge.stream import Running, SegmentRecord, Stream
from distmerge.work import WorkFolder
from distmerge.world import World

_REPORT_SECONDS = 0.5
_WAIT_SECONDS = 0.1
_MAX_LANES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What a rank did, and when: every segment it claimed, every weight file it ended, every input that it hashed."""

    segments: tuple[SegmentRecord, ...]
    shards: tuple[ShardRecord, ...]
    inputs: tuple[InputRecord, ...]
    log: RankLog

    @property
    def num_kept(self) -> int:
        """How many segments were finished by an earlier run."""
        return sum(span.kept for span in self.log.spans)

    def to_json(self) -> str:
        return encode_rows(self)

    @staticmethod
    def from_json(text: str) -> Records:
        records: Records = decode_rows(Records, json.loads(text))
        return records


class Share:
    """Does segments of `plan` on `device` and keeps their records; a context manager that ends its threads and
    gives torch its settings back. The run began `since` then, in Unix seconds."""

    def __init__(
        self,
        plan: Plan,
        config: MergeConfig,
        work: WorkFolder,
        world: World,
        device: torch.device,
        *,
        since: float,
    ) -> None:
        if world.place.rank != 0:  # which has just planned
            _check_alike(plan, config, device)
        self._precision = full_precision(num_threads=1)  # the lanes are the threads
        self._plan, self._work, self._world = plan, work, world
        self._earlier = work.done(plan)
        local_size = world.place.local_size
        wanted = wanted_lanes(local_size)
        budget = budget_here(plan, config.memory_budget, local_size, begun=True)
        self._stream = Stream(
            plan,
            config.base,
            tuple(adapter.home for adapter in config.all_adapters),
            lambda number: work.open_file(plan, number),
            device=device,
            num_lanes=count_lanes(plan, budget, wanted=wanted),
        )
        self._running: tuple[Running, float] | None = None
        self._followers = Followers(
            plan, work, world, self._earlier.shards, num_lanes=wanted, read_back=config.read_back
        )
        self._inputs = InputHashes(plan, config, world)
        self._segments: list[SegmentRecord] = []
        self._device, self._started = device, time.time()
        self._since = since
        self._spans: list[Span] = []
        self._reported = 0.0
        self._room = RoomWatch(plan, work.output, work.model)
        self._unread = 0
        self._doing = ""

    def __enter__(self) -> Share:
        self._precision.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._followers.close()
        self._inputs.close()
        self._stream.close()
        self._precision.__exit__(None, None, None)

    def do(self, number: int) -> None:
        """Writes segment `number`, unless an earlier run wrote it and its bytes are still what they were. On return
        the lanes may be at the last blocks of it, so that they need not wait for the next one to be claimed."""
        if self._running is not None and not self._stream.follows(number, self._running[0]):
            self._finish()
        self._doing = self._plan.files[self._plan.segments[number].file].name
        self._followers.begin(number)
        record, started = self._earlier.segments.get(number), time.time()
        if record is not None:
            self._finish()
            if self._is_there(record):
                self._end(record, started, kept=True)
                return
        running = self._stream.begin(number, self.tick)
        self._finish()
        self._running = running, started
        running.batch.handed_out(self.tick)

    def _finish(self) -> None:
        """Ends the segment that lanes are at work on, if there is one."""
        if self._running is not None:
            (running, started), self._running = self._running, None
            record = self._stream.finish(running, self.tick)
            self._work.note(self._plan, segment=record)
            self._end(record, started, kept=False)

    def _end(self, record: SegmentRecord, started: float, *, kept: bool) -> None:
        self._segments.append(record)
        nbytes = self._plan.segments[record.segment].nbytes
        start = max(started, self._spans[-1].end) if self._spans else started
        span = Span(segment=record.segment, start=start, end=max(start, time.time()), nbytes=nbytes, kept=kept)
        self._spans.append(span)
        self._followers.end(record.segment, kept=kept, crc32=record.crc32)

    def records(self) -> Records:
        """The records of everything that `do` did, once the files that this rank ended are durable."""
        self._finish()
        for doing, part in (("making files durable", self._followers), ("hashing inputs", self._inputs)):
            self._doing = doing
            while not part.wait(_WAIT_SECONDS):
                self.tick()
                self._world.watch("the segments of other ranks")
        self._report("waiting for the other ranks")
        return Records(
            segments=tuple(self._segments),
            shards=self._followers.records(),
            inputs=self._inputs.records(),
            log=RankLog(
                rank=self._world.place.rank,
                host=socket.gethostname(),
                device=str(self._device),
                start=self._started,
                end=max(self._started, time.time()),
                spans=tuple(self._spans),
                profile=profile_of(
                    self._stream.clocks,
                    [*self._followers.clocks, self._inputs.clock],
                    start=self._started - self._since,
                    seconds=time.time() - self._started,
                ),
            ),
        )

    def tick(self) -> None:
        """Notices signals and failed ranks, and reports progress; called a few times a second."""
        self._world.check()
        self._followers.check()  # a file that could not be ended ends the run now
        self._inputs.check()
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self._report(self._doing)
        if self._world.place.rank == 0 and self._room.is_due():
            self._room.check(sum(int(report.get("nbytes", 0)) for report in self._world.reports()))

    def _report(self, doing: str) -> None:
        self._reported = time.monotonic()
        self._world.report({"nbytes": self._stream.nbytes_done + self._unread, "doing": doing})

    def _is_there(self, record: SegmentRecord) -> bool:
        """True if what an earlier run wrote of a segment is there. Without a checksum only a file that was made durable
        is believed to be."""
        segment = self._plan.segments[record.segment]
        if record.crc32 is not None:
            return self._stream.check(record, self.tick)
        there = segment.file in self._earlier.shards and self._work.is_final(self._plan, segment.file)
        self._unread += segment.nbytes * there
        return there


def _check_alike(plan: Plan, config: MergeConfig, device: torch.device) -> None:
    """Raises MachineError or InputError if this rank would compute other bits than the one that planned, UsageError if
    it cannot compute the digests. The base's files are compared when they are opened."""
    require(plan.file_digest)
    mine = {"distmerge": __version__, "torch": torch.__version__, "device": device.type}
    mine["arithmetic"] = arithmetic(device.type)
    for what, value in mine.items():
        if plan.fingerprint[what] != value:
            raise MachineError(
                f"{what} is {value}, on rank 0 it is {plan.fingerprint[what]}",
                where=socket.gethostname(),
                hint="all ranks need the same installation and the same type of device"
                + ("; DISTMERGE_PURE=1 pip install compiles nothing" if what == "arithmetic" else ""),
            )
    for number, (choice, planned) in enumerate(zip(config.all_adapters, plan.adapters, strict=True)):
        used = used_tensors(plan.tasks, number) if planned.partial else ()
        seen = (choice.weight, weights_digest(choice.home, planned.files, used))
        if seen != (planned.weight, planned.weights_sha256):
            raise InputError(
                "is not the adapter that the merge was planned with, or has another weight",
                where=f"{choice.folder} on {socket.gethostname()}",
                hint="every rank must see the same adapters and get the same options",
            )


def wanted_lanes(local_size: int) -> int:
    """One lane for each core of this rank's part of the machine: more of them only push each other out of the caches.
    A rank on its own has two at least, so that one can compute while the other waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // local_size, 2 if local_size == 1 else 1), _MAX_LANES)
