"""The page cache made warm or cold for a folder, and asked how it is."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

_CACHESTAT = 451  # the number of the system call, on every architecture; Linux 6.5
_PIECE_NBYTES = 1 << 22


def warm_memory(nbytes: int) -> None:
    """Takes so much memory from the machine, at most half of what it has, and gives it back.

    A virtual machine hands freed memory back to its host and gets it again page by page, at a fraction of the speed of
    a copy: without this the first to write after a pause would pay for it.
    """
    nbytes = min(nbytes, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    populate = getattr(mmap, "MAP_POPULATE", 0)
    mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | populate).close()


def make_warm(folder: Path) -> float | None:
    """Reads every file of `folder` once; returns the share of its pages that are cached, where the kernel tells."""
    buffer = bytearray(_PIECE_NBYTES)
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return cached_share(folder)


def make_cold(folder: Path) -> float | None:
    """Drops every file of `folder` from the cache; returns the share of its pages that are still there."""
    for path in _files(folder):
        with _opened(path) as fd:
            os.fsync(fd)  # dirty pages stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(folder)


def cached_share(folder: Path) -> float | None:
    """The share of the pages of the files of `folder` that the cache holds; None where the kernel cannot tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    cached = total = 0
    for path in _files(folder):
        span = (ctypes.c_uint64 * 2)(0, size := path.stat().st_size)
        counts = (ctypes.c_uint64 * 5)()  # cached, dirty, under writeback, evicted, recently evicted
        with _opened(path) as fd:
            if libc.syscall(_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(counts), 0):
                return None
        cached += counts[0]
        total += -(-size // os.sysconf("SC_PAGE_SIZE"))
    return cached / max(total, 1)


def sync_folder(folder: Path) -> float:
    """Makes every file of `folder` durable, and the folder; the seconds that it took."""
    started = time.monotonic()
    for path in [*_files(folder), folder]:
        with _opened(path) as fd:
            os.fsync(fd)
    return time.monotonic() - started


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
