"""Blocks on disk that two files share until one of them is written to, where the file system has that (XFS, btrfs)."""

from __future__ import annotations

import fcntl
import os
import struct

BLOCK_NBYTES = 4096  # what is shared begins and ends at multiples of it, in both files alike
_FICLONERANGE = getattr(fcntl, "FICLONERANGE", 0x4020940D)


def whole_blocks(begin: int, nbytes: int) -> tuple[int, int]:
    """The bytes [first, last) of the blocks that lie wholly within `nbytes` bytes from `begin` on; maybe none, and then
    `last` is not above `first`."""
    return -(-begin // BLOCK_NBYTES) * BLOCK_NBYTES, (begin + nbytes) // BLOCK_NBYTES * BLOCK_NBYTES


def can_share(fd: int) -> bool:
    """True if the file system of the empty file `fd` lets files share blocks."""
    return _clone(fd, 0, 0, fd, 0)


def share_range(source: int, begin: int, fd: int, offset: int, nbytes: int) -> bool:
    """True if the file now holds at `offset` the `nbytes` bytes that `source` holds at `begin`: whole blocks shared,
    what is left of the first and the last one copied.

    False, with any bytes there, if nothing can be shared: the bytes have other places in their blocks, are less than a
    block, lie on two file systems, or on one that cannot.
    """
    first, last = whole_blocks(offset, nbytes)
    shift = begin - offset
    if shift % BLOCK_NBYTES or last <= first or not _clone(source, first + shift, last - first, fd, first):
        return False
    try:
        return all(
            os.pwrite(fd, os.pread(source, end - start, start + shift), start) == end - start
            for start, end in ((offset, first), (last, offset + nbytes))
        )
    except OSError:  # a copy by hand tells why
        return False


def _clone(source: int, begin: int, nbytes: int, fd: int, offset: int) -> bool:
    try:
        fcntl.ioctl(fd, _FICLONERANGE, struct.pack("=qQQQ", source, begin, nbytes, offset))
    except OSError:
        return False
    return True
