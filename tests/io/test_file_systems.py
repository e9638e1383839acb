"""File systems and kernels that lack what the merge asks for: it takes longer, and gives the same bytes."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from distmerge.errors import MachineError
from distmerge.storage import files
from tests.conftest import digests
from tests.factories import merge


class Libc:
    """A C library whose calls fail with `codes`, one after another, and then do nothing, successfully."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.calls = list(codes), list[tuple[Any, ...]]()

    def _call(self, *arguments: Any) -> int:
        self.calls.append(arguments)
        if not self.codes:
            return 0
        ctypes.set_errno(self.codes.pop(0))
        return -1

    fallocate = sync_file_range = _call


def refuse(*arguments: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.fixture(params=["the calls", "their support"])
def poor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without preallocation, writeback, advice and kernel copies, where they would be asked for."""
    if request.param == "the calls":
        monkeypatch.setattr(files, "_LIBC", object())
        for name in ("copy_file_range", "posix_fadvise"):
            monkeypatch.delattr(os, name)
    else:
        monkeypatch.setattr(files, "_LIBC", Libc(*[errno.EOPNOTSUPP] * 1000))
        for name in ("copy_file_range", "posix_fadvise"):
            monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("distmerge.page_cache.memory_nbytes", lambda: 1)


@pytest.mark.usefixtures("poor")
@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_on_a_poor_system_the_bytes_are_the_same(
    digest: str, base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    assert digests(merge(base, adapter, tmp_path / "out", digest=digest)) == digests(merged)


@pytest.mark.parametrize("nbytes", [0, 5, 4096])
@pytest.mark.parametrize("before", [0, 7, 5000])
def test_a_file_has_the_length_that_it_was_given_however_long_it_was(before: int, nbytes: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * before)
    with path.open("r+b") as file:
        files.allocate(file.fileno(), nbytes, path)
    assert path.read_bytes() == b"x" * min(before, nbytes) + bytes(max(0, nbytes - before))


@pytest.mark.parametrize(
    ("codes", "num_calls"),
    [((), 1), ((errno.EINTR, errno.EINTR), 3), ((errno.ENOSYS,), 1), ((errno.EINTR, errno.EOPNOTSUPP), 2)],
)
def test_preallocation_goes_on_after_a_signal_and_ends_where_it_is_not_known(
    codes: tuple[int, ...], num_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc(*codes)
    monkeypatch.setattr(files, "_LIBC", libc)
    with (tmp_path / "file").open("w+b") as file:
        files.allocate(file.fileno(), 100, "file")
        assert os.fstat(file.fileno()).st_size == 100
    assert len(libc.calls) == num_calls


def test_a_disk_without_room_is_said_when_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LIBC", Libc(errno.EINTR, errno.ENOSPC))
    with (tmp_path / "file").open("w+b") as file, pytest.raises(MachineError, match="ENOSPC") as caught:
        files.allocate(file.fileno(), 100, "file")
    assert "resumes" in caught.value.hint
