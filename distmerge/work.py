"""The work folder beside the output: the manifest, the growing model, and records of what is finished.

OUT.distmerge/
  manifest.json           the plan, and what it was made from
  model/                  becomes OUT; an unfinished weight file ends in `.part`, which no loader globs
  done/                   journals, one a rank and attempt: a line for each finished segment and shard
  status.json  events.jsonl
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmerge.clock import during
from distmerge.errors import InputError, VerifyError
from distmerge.journal import Done, Journal, ShardRecord, read_journals
from distmerge.manifest import Manifest, read_manifest
from distmerge.page_cache import outgrows_cache
from distmerge.plan import Plan
from distmerge.redaction import redacted_json
from distmerge.room import check_room
from distmerge.storage.files import (
    allocate,
    begins_with,
    close,
    drop_cache,
    fsync_dir,
    io_errors,
    rename,
    replace_file,
    sync_or_drop,
    write_exact,
)
from distmerge.storage.records import encode
from distmerge.storage.sharing import can_share
from distmerge.stream import SegmentRecord
from distmerge.untouched import spans_to_reserve

_MANIFEST = "manifest.json"
_LOCK_SECONDS = 10.0
_STALE_SECONDS = 60.0


class WorkFolder:
    """The work folder of the merge into `output`, a sibling of it on the same file system."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.parent / f"{output.name}.distmerge"
        self.model = self.path / "model"
        self._done = self.path / "done"
        self._scratch = output.absolute().parent / f"{output.name}.distmerge-pickles"
        self._made_scratch = False
        self.is_fresh = False
        self._is_ours = False
        self._plan: Plan | None = None
        self._lock: int | None = None
        self._journal = Journal(self._done)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # -- opening

    def scratch(self) -> Path:
        """A folder beside the work folder for adapters that were pickles, rewritten; every rank reads them there."""
        self._made_scratch = not self._scratch.exists()
        return self._scratch

    def drop_scratch(self, *, refused: bool) -> None:
        """Removes the rewritten adapters; of a run that was refused only if nobody else may be reading them."""
        if refused and not self._made_scratch:
            return
        for path in self._scratch.glob("*.safetensors*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._scratch.rmdir()

    def open(self, plan: Plan) -> str:
        """Makes the folder ready for `plan`, or finds it ready, and returns the plan's digest.

        Holds the folder until `release`. Raises InputError if it belongs to another merge, MachineError if there is
        no room; a folder that was not there before is then gone again.
        """
        self.check(plan)
        with io_errors(self.path):
            self._check_room(plan)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)
        self._take_lock()
        self.is_fresh = not (self.path / _MANIFEST).exists()
        try:
            self._agree(plan)
            with io_errors(self.path):
                self._done.mkdir(exist_ok=True)
                self.model.mkdir(exist_ok=True)
            for number in range(len(plan.files)):
                self._prepare(plan, number)
            fsync_dir(self.model)
            fsync_dir(self.path)
        except BaseException:
            self.leave_if_fresh()
            raise
        self._is_ours = True
        self._plan = plan
        return plan.digest

    def check(self, plan: Plan) -> None:
        """Raises InputError if the folder is not ours, or holds an unfinished merge of something else."""
        with io_errors(self.path):
            _check_foreign(self.path)
            if (self.path / _MANIFEST).exists():
                self._agree(plan)

    def leave_if_fresh(self) -> None:
        """Removes what `open` has made, unless an earlier run had made it before."""
        if self.is_fresh:
            self.discard()
        self.release()

    def load(self, digest: str) -> Plan:
        """The plan in the manifest, as rank 0 wrote it. Raises VerifyError if it is not the expected one."""
        if self._plan is not None and self._plan.digest == digest:
            return self._plan
        path = self.path / _MANIFEST
        deadline = time.monotonic() + _STALE_SECONDS  # a network file system may show the file late
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        manifest = read_manifest(path)
        plan = manifest.plan() if manifest is not None and manifest.digest == digest else None
        self._is_ours = True
        if plan is None:
            raise VerifyError(
                "the manifest is not the one that rank 0 has written",
                where=str(path),
                hint="every rank must see the same folder; is the output on storage that all nodes share?",
            )
        return plan

    def done(self, plan: Plan) -> Done:
        """What the journals say is finished under this very plan, as far as it fits the plan."""
        with io_errors(self._done):
            return read_journals(self._done, plan)

    # -- weight files

    def open_file(self, plan: Plan, number: int) -> int:
        """A descriptor for reading and writing weight file `number`, finished or not."""
        return self._open_either(plan.files[number].name, os.O_RDWR)

    def is_final(self, plan: Plan, number: int) -> bool:
        """True if weight file `number` has its final name and its length, and no other is about to take its place."""
        file = plan.files[number]
        path = self.model / file.name
        return path.is_file() and path.stat().st_size == file.nbytes and not (self.model / f"{file.name}.part").exists()

    def finish(
        self,
        plan: Plan,
        number: int,
        follow: Callable[[int], tuple[str, tuple[int, ...]]],
        again: Callable[[int, str], tuple[int, ...]] | None = None,
    ) -> ShardRecord:
        """Makes weight file `number` durable under its final name.

        `follow` gets a descriptor of the file, returns once all of its segments are written, with its digest and their
        CRC-32s, and may raise to abandon the file as it is. `again` gets the descriptor and the digest once the file is
        durable and out of the page cache, and returns the CRC-32s anew.
        """
        file = plan.files[number]
        part, final = self.model / f"{file.name}.part", self.model / file.name
        fd = self._open_either(file.name, os.O_RDWR)
        try:
            digest, crcs = follow(fd)
            if (nbytes := os.fstat(fd).st_size) != file.nbytes:
                raise VerifyError(f"has {nbytes} bytes, planned were {file.nbytes}", where=file.name)
            if not begins_with(part if part.exists() else final, plan.header_of(number)):
                raise VerifyError("the header on disk is not the planned one", where=file.name)
            with io_errors(final), during("fsync"):
                sync_or_drop(fd, part, final)
            if again is not None or outgrows_cache(plan):
                drop_cache(fd, 0, nbytes)
            if again is not None:
                crcs = again(fd, digest)
        finally:
            close(fd, final)
        with io_errors(final):
            try:
                rename(part, final)
            except FileNotFoundError:  # an earlier attempt, or a rank that outlived it, was here first
                if not final.exists():
                    raise
        fsync_dir(self.model)
        return ShardRecord(file=number, nbytes=nbytes, digest=digest, segment_crc32s=crcs)

    def note(self, plan: Plan, **record: SegmentRecord | ShardRecord) -> None:
        """Appends a line to this process's journal: `segment=` or `shard=`. A shard's line is made durable."""
        line = f"{encode({'plan': plan.digest, **record})}\n".encode()
        self._journal.append(line, durable="shard" in record)

    # -- people

    def write_status(self, status: dict[str, Any]) -> None:
        """Replaces status.json; a reader never sees a part of it. Not durable, and never a reason to fail."""
        temporary = self.path / f".status.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):
            if not self._is_ours or not (self.path / _MANIFEST).exists():
                return
            temporary.write_text(redacted_json(status) + "\n", encoding="utf-8")
            temporary.replace(self.path / "status.json")

    def event(self, name: str, **fields: Any) -> None:
        """Appends a line to events.jsonl. Never a reason to fail."""
        with contextlib.suppress(OSError):
            if not (self.path / _MANIFEST).exists():
                return
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(redacted_json({"time": round(time.time(), 3), "event": name, **fields}) + "\n")

    # -- closing

    def release(self) -> None:
        """Closes the journal and lets others have the folder."""
        self._journal.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):  # nothing was written to it
                os.close(lock)

    def clear_after(self, plan: Plan) -> None:
        """Removes what a run that died after publishing `plan` has left behind."""
        earlier = read_manifest(self.path / _MANIFEST)
        names = set(_names(self.path)) if self.path.is_dir() else set()
        # Without a manifest, what only people read is nobody's.
        if names <= {"status.json", "events.jsonl"} if earlier is None else earlier.digest == plan.digest:
            self.discard()

    def discard(self) -> None:
        """Removes the folder with all that is in it; last of all the manifest, which says whose it is."""
        self._journal.close()  # NFS keeps the name of an open file
        with contextlib.suppress(OSError):  # under the lock: nobody can have made it anew
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                for name in sorted(_names(fd), key=lambda name: name == _MANIFEST):
                    if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                        shutil.rmtree(name, dir_fd=fd)
                    else:
                        os.unlink(name, dir_fd=fd)
            finally:
                os.close(fd)
        self.release()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    # -- inner steps

    def _take_lock(self) -> None:
        # Only a courtesy: two launches of one merge write equal bytes to equal places, and one rename publishes.
        with io_errors(self.path):
            path = self.path / ".lock"
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    return  # a file system without locks
            else:
                if path.exists() and os.path.samestat(os.fstat(self._lock), path.stat()):
                    return
                raise InputError(
                    "another merge into this output has just ended",
                    where=str(self.path),
                    hint="run the same command again: it finds the result, or resumes",
                )
            if time.monotonic() > deadline:
                raise InputError(
                    "another merge into this output is running",
                    where=str(self.path),
                    hint="wait for it, or stop it first",
                )
            time.sleep(0.2)

    def _agree(self, plan: Plan) -> None:
        path = self.path / _MANIFEST
        if not path.exists():
            replace_file(path, Manifest.of(plan).data)
            return
        manifest = read_manifest(path)
        if manifest is not None and manifest.digest == plan.digest:
            return
        earlier = manifest.plan() if manifest is not None else None
        if earlier is None:
            what = "whose manifest is damaged, or of another version of distmerge"
        else:
            changed = _changes(earlier.fingerprint, plan.fingerprint) or "the layout, or side files of the inputs"
            what = f"of other inputs or options; changed: {changed}"
        raise InputError(
            f"holds an unfinished merge {what}",
            where=str(self.path),
            hint=f"finish that merge with its own command, or delete {self.path} to start over",
        )

    def _check_room(self, plan: Plan) -> None:
        check_room(plan, self.output, self.model)

    def _prepare(self, plan: Plan, number: int) -> None:
        """The weight file with its header and its full length, its data as far as earlier runs wrote it."""
        file, header = plan.files[number], plan.header_of(number)
        part, final = self.model / f"{file.name}.part", self.model / file.name
        with io_errors(part):
            if final.exists():
                if begins_with(final, header) and final.stat().st_size == file.nbytes:
                    return
                final.rename(part)  # not what was made durable: it is unfinished
            if not part.exists():
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
            fd = self._open_either(file.name, os.O_RDWR)
        try:
            if os.fstat(fd).st_size != file.nbytes:
                # What is to share blocks of an input must have none of its own: btrfs would keep them.
                allocate(fd, file.nbytes, part, spans_to_reserve(plan, number) if can_share(fd) else None)
            write_exact(fd, memoryview(header), 0, part)
        finally:
            close(fd, part)

    def _open_either(self, name: str, flags: int) -> int:
        """Opens the unfinished file, or the finished one; another rank may be renaming the one to the other."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        with io_errors(self.model / name):
            try:
                return os.open(self.model / f"{name}.part", flags)
            except FileNotFoundError:
                return os.open(self.model / name, flags)


def _check_foreign(path: Path) -> None:
    """Raises InputError if what is at `path` is anything but a work folder."""
    if not path.exists() and not path.is_symlink():
        return
    ours = {".lock", "model", "done", "status.json", "events.jsonl", "replaced", _MANIFEST}
    if path.is_symlink() or not path.is_dir():
        raise InputError("is there and is no work folder of distmerge", where=str(path), hint="move it away")
    names = set(_names(path)) - ours
    if any(not (name.startswith(".") and name.endswith(".tmp")) for name in names):  # a kill leaves unfinished ones
        raise InputError("holds files that are not of distmerge", where=str(path), hint="move it away")


def _names(folder: Path | int) -> list[str]:
    """The names in `folder`, but for those that an NFS client gives to files that were removed and are still open."""
    return [name for name in os.listdir(folder) if not name.startswith(".nfs")]


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return "; ".join(f"{key} ({before.get(key, 'absent')} -> {now.get(key, 'absent')})" for key in keys)[:1000]
