"""Files read exactly, written whole and made durable; every OSError leaves here as a sentence."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from distmerge.errors import InputError, MachineError, printable

WRITE_NBYTES = 1 << 18  # larger buffered writes ask the kernel for huge folios, and may wait for them
READ_NBYTES = 4 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)

_ADVICE = {
    errno.ENOSPC: "free some room, then run the same command again: it resumes",
    errno.EDQUOT: "the quota is used up; free some room, then run the same command again: it resumes",
    errno.EFBIG: "a file size limit is in force (ulimit -f)",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine (sysctl fs.file-max)",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "the disk or its server fails: look at the system's log; the same command resumes",
    errno.ESTALE: "the file server has forgotten the file; the same command resumes",
    errno.EACCES: "check the permissions",
}
_MACHINES_FAULT = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM)


@contextlib.contextmanager
def io_errors(where: str | Path) -> Iterator[None]:
    """Turns an OSError of the body into a MachineError that names `where`."""
    try:
        yield
    except OSError as error:
        raise machine_error(error, where) from error


def machine_error(error: OSError, where: str | Path) -> MachineError:
    """What went wrong at `where`, in words, with what helps."""
    code = error.errno or 0
    text = f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"
    return MachineError(text, where=str(where), hint=_ADVICE.get(code, ""))


@contextlib.contextmanager
def lookup_errors(where: str | Path) -> Iterator[None]:
    """Turns an OSError of the body, which looks for input files, into an InputError that names `where`."""
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else str(where)
        raise InputError(f"cannot be looked at ({error.strerror})", where=printable(path)) from None


def open_input(path: Path) -> int:
    """A read-only descriptor of a regular file, symlinks followed. Raises InputError for anything else, MachineError
    where it is the machine that cannot open files."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    except OSError as error:
        if error.errno in _MACHINES_FAULT:
            raise machine_error(error, path) from error
        raise InputError(f"cannot be opened ({error.strerror})", where=str(path)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError("is not a regular file", where=str(path))
    return fd


def read_exact(fd: int, view: memoryview, offset: int, where: str | Path) -> None:
    """Fills `view` from `offset` of the file. Raises MachineError when the file ends early."""
    done = 0
    while done < len(view):
        with io_errors(where):
            count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise MachineError(f"ended at byte {offset + done}, {len(view) - done} bytes early", where=str(where))
        done += count


def begins_with(path: Path, data: bytes) -> bool:
    """True if the file at `path`, which is not followed if it is a link, begins with these bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_size < len(data):
            return False
        found = bytearray(len(data))
        read_exact(fd, memoryview(found), 0, path)
        return found == data
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder. One that is said to have failed and has happened is done: network file systems may tell
    so (rename(2), BUGS). Raises OSError."""
    before = os.lstat(source)
    try:
        os.rename(source, target)
    except OSError:
        if os.path.lexists(source) or not os.path.lexists(target) or not os.path.samestat(os.lstat(target), before):
            raise


def write_exact(fd: int, view: memoryview, offset: int, where: str | Path) -> None:
    """Writes all of `view` at `offset` of the file, in slices of at most 256 KiB."""
    done = 0
    with io_errors(where):
        while done < len(view):
            done += os.pwrite(fd, view[done : done + WRITE_NBYTES], offset + done)


def copy_range(source: int, begin: int, fd: int, offset: int, nbytes: int) -> int:
    """Has the kernel copy bytes of the file `source` to `offset` of another one, without a look at them, where it can:
    how many it copied, which may be none."""
    done = 0
    with contextlib.suppress(OSError, AttributeError):  # other file systems, other systems; a copy by hand tells why
        while done < nbytes:
            count = os.copy_file_range(source, fd, nbytes - done, begin + done, offset + done)
            if count == 0:
                break
            done += count
    return done


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Lets the disk begin with these bytes of the file, where the system can, so that an fsync later finds little left;
    they are not durable by that."""
    if (start := getattr(_LIBC, "sync_file_range", None)) is not None and nbytes > 0:
        start(fd, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes), ctypes.c_uint(2))  # SYNC_FILE_RANGE_WRITE


def drop_cache(fd: int, offset: int, nbytes: int) -> None:
    """Gives the memory that caches the whole pages of these bytes back, where the system can; what is yet to be
    written stays."""
    if hasattr(os, "posix_fadvise") and nbytes > 0:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def read_range(path: Path, offset: int, nbytes: int) -> bytes:
    """`nbytes` bytes of the input file at `path` from `offset`."""
    fd = open_input(path)
    try:
        data = bytearray(nbytes)
        read_exact(fd, memoryview(data), offset, path)
        return bytes(data)
    finally:
        close(fd, path)


def read_input(path: Path, max_nbytes: int) -> bytes:
    """The whole of a small input file. Raises InputError if it is missing, no regular file or too large."""
    fd = open_input(path)
    try:
        if (size := os.fstat(fd).st_size) > max_nbytes:
            raise InputError(f"has {size} bytes, at most {max_nbytes} are read", where=str(path))
        data = bytearray(size)
        read_exact(fd, memoryview(data), 0, path)
        return bytes(data)
    finally:
        close(fd, path)


def sync_or_drop(fd: int, *paths: Path) -> None:
    """Makes the file durable. Where that fails it is removed from `paths`: the kernel forgets what it could not write,
    and shows it from its cache all the same, so that the bytes must be made anew. Raises OSError."""
    try:
        os.fsync(fd)
    except OSError:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def fsync_dir(path: Path) -> None:
    """Makes the names in the folder durable. File systems that cannot (EINVAL) are left alone."""
    with io_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)


def allocate(fd: int, nbytes: int, where: str | Path, spans: Iterable[tuple[int, int]] | None = None) -> None:
    """Gives the file exactly `nbytes` bytes, all of them, or those of `spans` [first, last), reserved on disk where the
    file system can; ENOSPC shows up here."""
    reserve = getattr(_LIBC, "fallocate", None)  # glibc's posix_fallocate would write the whole file on NFS
    with io_errors(where):
        os.ftruncate(fd, nbytes)
        if reserve is None or nbytes == 0:
            return
        for first, last in ((0, nbytes),) if spans is None else spans:
            while reserve(fd, 0, ctypes.c_longlong(first), ctypes.c_longlong(last - first)) != 0:
                code = ctypes.get_errno()
                if code in (errno.EOPNOTSUPP, errno.ENOSYS):
                    return
                if code != errno.EINTR:  # after a signal, which is noticed elsewhere
                    raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file, which is at `path`, durably, once the body has ended well; until then there is
    nothing, or what was there before."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    with io_errors(path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    fsync_dir(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """The file at `path` holds `data`, durably, with ordinary permissions; at no instant a part of it."""
    with replacing(path) as fd:
        write_exact(fd, memoryview(data), 0, path)


def copy_file(source: Path, path: Path) -> str:
    """The file at `path` holds what `source` holds, durably; returns its SHA-256. Reads and writes in pieces."""
    with replacing(path) as fd:
        offset = 0

        def write(piece: memoryview) -> None:
            nonlocal offset
            write_exact(fd, piece, offset, path)
            offset += len(piece)

        return sha256_of(source, write)


def sha256_of(path: Path, each: Callable[[memoryview], None] | None = None) -> str:
    """The SHA-256 of the file in hex, read in pieces; `each` sees every piece as it passes."""
    digest = hashlib.sha256()
    for piece in pieces_of(path):
        digest.update(piece)
        if each is not None:
            each(piece)
    return digest.hexdigest()


def pieces_of(path: Path) -> Iterator[memoryview]:
    """The bytes of the input file at `path` one after another, each piece in the memory of the one before."""
    fd = open_input(path)
    try:
        buffer, offset, size = memoryview(bytearray(READ_NBYTES)), 0, os.fstat(fd).st_size
        while offset < size:
            piece = buffer[: min(READ_NBYTES, size - offset)]
            read_exact(fd, piece, offset, path)
            yield piece
            offset += len(piece)
    finally:
        close(fd, path)


def close(fd: int, where: str | Path) -> None:
    """Closes a file. Raises MachineError: a file server may say only now that it could not keep what was written."""
    with io_errors(where):
        os.close(fd)


def free_nbytes(folder: Path) -> int:
    """Bytes that this user can still write on the file system of `folder` or of its nearest existing parent."""
    usage = _usage(folder)
    return usage.f_bavail * usage.f_frsize


def free_files(folder: Path) -> int | None:
    """Files that this user can still make there; None where the file system counts none."""
    usage = _usage(folder)
    return usage.f_favail if usage.f_files else None


def _usage(folder: Path) -> os.statvfs_result:
    while not folder.exists():
        folder = folder.parent
    return os.statvfs(folder)
