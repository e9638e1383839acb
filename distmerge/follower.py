"""Weight files on their way to the end: each is read back while it is still being written, so that at its end little
is left to hash; then it is made durable."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from distmerge.clock import Clock, during
from distmerge.errors import FAILED_STORAGE, Interrupted, VerifyError
from distmerge.journal import ShardRecord
from distmerge.plan import FOLLOWER_NBYTES, MAX_FOLLOWERS, Plan
from distmerge.storage.checksums import crc32, hasher
from distmerge.storage.files import read_exact, start_writeback
from distmerge.verify import lost_bytes
from distmerge.work import WorkFolder
from distmerge.world import World

_POLL_SECONDS = 0.02  # between questions for a segment that another rank writes


class Followers:
    """Ends the files whose first segments this rank does, each in a thread that follows its segments in their order,
    whichever ranks write them; `earlier` are files that an earlier run has ended.

    A rank that goes on to its next file does not wait for the digest of the last one: SHA-256 takes about half as long
    as a lane takes to merge, so that one thread for two of `num_lanes` keeps up with them. More would only compete.
    With `read_back` a file that is durable is read once more, from storage.
    """

    def __init__(
        self,
        plan: Plan,
        work: WorkFolder,
        world: World,
        earlier: Mapping[int, ShardRecord],
        *,
        num_lanes: int,
        read_back: bool = False,
    ) -> None:
        self._plan, self._work, self._world, self._read_back = plan, work, world, read_back
        self._earlier = {} if read_back else earlier  # that those files were read back nobody tells
        self._pool = ThreadPoolExecutor(min(max(num_lanes // 2, 2), MAX_FOLLOWERS), "follow")
        self.clocks: list[Clock] = []
        self._ends: list[Future[ShardRecord]] = []
        self._begun: set[int] = set()
        self._ended: dict[int, int | None] = {}
        self._changed = threading.Condition()
        self._leaving = threading.Event()

    def close(self) -> None:
        """Ends the threads, leaving files that are not whole as they are."""
        self._leaving.set()
        with self._changed:
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, segment: int) -> None:
        """Says that this rank does `segment` now; the rank that does the first of a file ends that file."""
        file = self._plan.segments[segment].file
        self._begun.add(segment)
        if segment == self._plan.segments_of(file)[0]:
            self._ends.append(self._pool.submit(self._end, file))

    def end(self, segment: int, *, kept: bool, crc32: int | None = None) -> None:
        """Says that `segment` is on disk: written by this rank, or `kept` from an earlier run; its bytes have this
        CRC-32, if it is known."""
        if not kept:
            self._world.count(f"written/{self._plan.segments[segment].file}")
        self._world.count(f"ended/{segment}")
        with self._changed:
            self._ended[segment] = crc32
            self._changed.notify_all()

    def check(self) -> None:
        """Raises the error of a file that could not be ended."""
        for end in self._ends:
            if end.done():
                end.result()

    def wait(self, timeout: float) -> bool:
        """True once all files of this rank are durable; waits for that as long as told, in seconds."""
        return not wait(self._ends, timeout=timeout).not_done

    def records(self) -> tuple[ShardRecord, ...]:
        """The records of all files of this rank, once they are durable."""
        return tuple(end.result() for end in self._ends)

    def _end(self, file: int) -> ShardRecord:
        earlier = self._earlier.get(file)
        if earlier is not None:
            self._wait_for_all(file)
            if self._world.counted(f"written/{file}") == 0 and self._work.is_final(self._plan, file):
                return earlier
        with Clock() as clock:
            self.clocks.append(clock)
            again = partial(self._compare, file) if self._read_back else None
            record = self._work.finish(self._plan, file, partial(self._follow, file), again)
        self._work.note(self._plan, shard=record)
        told = {self._plan.file_digest: record.digest} if record.digest else {}
        name = self._plan.files[file].name
        self._work.event("shard_done", file=name, nbytes=record.nbytes, read_back=self._read_back, **told)
        return record

    def _follow(self, file: int, fd: int) -> tuple[str, tuple[int, ...]]:
        """Waits for all segments of `file`. Its digest and the CRC-32s of its segments, as they are read back one after
        the other; nothing for a kind of digest that does without."""
        written = self._written(file, fd)
        if not self._plan.reads_back:
            deque(written, maxlen=0)
            return "", ()
        return self._read(file, fd, written, self._plan.file_digest)

    def _compare(self, file: int, fd: int, digest: str) -> tuple[int, ...]:
        """The CRC-32s of the segments of `file`, which is whole, as it is read now. Raises VerifyError if its digest is
        no longer `digest`; where there is none, those who have the segments' CRC-32s will see."""
        segments = (self._plan.segments[number].nbytes for number in self._plan.segments_of(file))
        found, crcs = self._read(file, fd, segments, self._plan.file_digest if digest else "crc32")
        if digest and found != digest:
            raise VerifyError(
                f"storage gives back other bytes than were written: {self._plan.file_digest} is {found}, was {digest}",
                where=self._plan.files[file].name,
                hint=FAILED_STORAGE,
            )
        return crcs

    def _read(self, file: int, fd: int, segments: Iterable[int], kind: str) -> tuple[str, tuple[int, ...]]:
        """The digest of `file` and the CRC-32s of its segments, whose lengths come one after the other."""
        digest, offset = hasher(kind), 0
        buffer = memoryview(bytearray(FOLLOWER_NBYTES))

        def take(nbytes: int) -> int:
            nonlocal offset
            end, found = offset + nbytes, 0
            with during("digest"):
                while offset < end:
                    if self._leaving.is_set():
                        raise Interrupted("the rank is ending")
                    piece = buffer[: min(len(buffer), end - offset)]
                    read_exact(fd, piece, offset, self._plan.files[file].name)
                    digest.update(piece)
                    found = crc32(piece, found)
                    offset += len(piece)
            return found

        take(self._plan.files[file].data_begin)
        crcs = tuple(take(nbytes) for nbytes in segments)
        mine = [self._ended.get(number) for number in self._plan.segments_of(file)]
        if lost := sum(crc is not None and crc != found for crc, found in zip(mine, crcs, strict=True)):
            raise lost_bytes(lost, self._plan.files[file].name)  # it does not get its name
        return digest.hexdigest(), crcs

    def _written(self, file: int, fd: int) -> Iterator[int]:
        """The lengths of the segments of `file` in order, each once it is there and the disk has begun with it."""
        offset = self._plan.files[file].data_begin
        for segment in self._plan.segments_of(file):
            self._wait(segment)
            nbytes = self._plan.segments[segment].nbytes
            with during("fsync"):
                start_writeback(fd, offset, nbytes)  # it may take a while: no lane waits for it
            offset += nbytes
            yield nbytes

    def _wait_for_all(self, file: int) -> None:
        for segment in self._plan.segments_of(file):
            self._wait(segment)

    def _wait(self, segment: int) -> None:
        """Returns once `segment` is on disk. That the rank that does it may be lost, or this one is to stop, its main
        thread notices; it then closes this."""
        while segment not in self._ended:
            if self._leaving.is_set():
                raise Interrupted("the rank is ending")
            if segment not in self._begun and self._world.counted(f"ended/{segment}"):
                return
            with self._changed:
                if segment not in self._ended and not self._leaving.is_set():
                    self._changed.wait(_POLL_SECONDS)
