"""Machines that allow little: limits of a process, small and failing disks, power cuts. What needs root says so."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.attempts import ANY, CHANGES, Scene, can_mount, work_of

SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN: what is not on disk yet never will be
USER = 65534
needs_root = pytest.mark.skipif(not can_mount(), reason="mounting needs root")
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_{0}, ({1}, {1}))"
NEEDED = "import re; used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"


# -- limits


@pytest.mark.parametrize("nbytes", [2000, 4000, 5000, 20_000])
def test_a_limit_on_the_size_of_files_is_named(nbytes: int, scene: Scene, room: Path) -> None:
    attempt = scene.attempt(room / "1" / "out", setup=LIMIT.format("FSIZE", nbytes))
    assert attempt.code in (0, 5), attempt.words
    assert attempt.code == 0 or "ulimit -f" in attempt.words
    assert attempt.said_well(), attempt.words
    scene.assert_finishes(room / "1" / "out")


@pytest.mark.parametrize("number", [6, 8, 10, 12, 14, 16, 20, 24])
def test_a_limit_on_open_files_is_named(number: int, scene: Scene, room: Path) -> None:
    attempt = scene.attempt(room / "1" / "out", setup=LIMIT.format("NOFILE", number))
    assert attempt.code in (0, 5), attempt.words
    assert attempt.code == 0 or "ulimit -n" in attempt.words
    assert attempt.said_well(), attempt.words
    scene.assert_finishes(room / "1" / "out")


@pytest.mark.parametrize("mib", [0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128])
def test_a_limit_on_memory_is_named(mib: int, scene: Scene, room: Path) -> None:
    setup = NEEDED + LIMIT.format("AS", f"used + {mib << 20}")
    attempt = scene.attempt(room / "1" / "out", setup=setup)
    assert attempt.code in (0, 5), attempt.words
    assert attempt.said_well(), attempt.words
    scene.assert_finishes(room / "1" / "out")


@needs_root
def test_a_merge_that_the_kernel_kills_for_its_memory_is_finished_with_more(scene: Scene, room: Path) -> None:
    group = Path("/sys/fs/cgroup/memory") / f"distmerge-faults-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(4 << 20))
    except OSError:
        pytest.skip("there is no memory cgroup of version 1 to write to")
    try:
        setup = f"open('{group}/cgroup.procs', 'w').write(str(__import__('os').getpid()))"
        attempt = scene.attempt(room / "1" / "out", setup=setup)
        assert attempt.code in (-signal.SIGKILL, 5), attempt.words
        scene.assert_finishes(room / "1" / "out")
    finally:
        group.rmdir()


# -- disks


@contextlib.contextmanager
def mounted(folder: Path, *args: str) -> Iterator[Path]:
    """A file system below `folder`; skips where it cannot be mounted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *args, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def ext4(folder: Path, *options: str, mount: str = "loop") -> Iterator[Path]:
    image = folder / "image"
    if not image.exists():
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("there is no mkfs.ext4")
        with image.open("wb") as file:
            file.truncate(24 << 20)
        subprocess.run(["mkfs.ext4", "-q", *options, str(image)], check=True)
    with mounted(folder / "disk", "-o", mount, str(image)) as disk:
        yield disk


@needs_root
def test_a_disk_that_fills_up_is_named_and_the_merge_goes_on_when_there_is_room(scene: Scene, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as disk:
        for moment in (4, 12, 30, 60):
            output = disk / str(moment) / "out"
            stopped = scene.attempt(output, calls=CHANGES, nth=moment, kind="stop")
            assert stopped.code is None, stopped.words
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            attempt = scene.parent.signal(stopped.pid, signal.SIGCONT)
            assert attempt.code == 5, attempt.words
            assert "ENOSPC" in attempt.words
            scene.assert_absent_or_whole(output)
            refused = scene.attempt(output)
            assert refused.code == 5, refused.words
            assert "bytes more" in refused.errors[0]
            (disk / "filler").unlink()
            scene.assert_finishes(output)


@needs_root
def test_a_file_system_without_inodes_is_named(scene: Scene, tmp_path: Path) -> None:
    options = ("-t", "tmpfs", "-o", "size=4m,nr_inodes=64", "tmpfs")
    for moment in (0, 4, 12, 30, 60):
        with mounted(tmp_path / "disk", *options) as disk:
            output = disk / "1" / "out"
            stopped = scene.attempt(output, calls=CHANGES, nth=moment, kind="stop") if moment else None
            output.parent.mkdir(exist_ok=True)
            fillers = disk / "fillers"
            fillers.mkdir()
            with contextlib.suppress(OSError):
                for number in range(64):
                    (fillers / str(number)).touch()
            if stopped is not None:
                attempt = scene.parent.signal(stopped.pid, signal.SIGCONT)
                assert attempt.code == 5, attempt.words
                assert "ENOSPC" in attempt.words or "inodes" in attempt.words
                assert attempt.said_well(), attempt.words
                scene.assert_absent_or_whole(output)
            refused = scene.attempt(output)
            assert refused.code == 5, refused.words
            assert "(inodes)" in refused.errors[0]
            shutil.rmtree(fillers)
            scene.assert_finishes(output)


@needs_root
def test_a_file_system_that_turns_read_only_is_named(scene: Scene, tmp_path: Path) -> None:
    for moment in (5, 20, 40, 60):
        with ext4(tmp_path) as disk:
            output = disk / str(moment) / "out"
            stopped = scene.attempt(output, calls=CHANGES, nth=moment, kind="stop")
            subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=False, capture_output=True)
            attempt = scene.parent.signal(stopped.pid, signal.SIGCONT)
            assert attempt.code == 5, attempt.words
            assert attempt.said_well(), attempt.words
        with ext4(tmp_path) as disk:
            scene.assert_finishes(disk / str(moment) / "out", kept=ANY)


@needs_root
def test_a_quota_is_named(scene: Scene, tmp_path: Path) -> None:
    with ext4(tmp_path, "-O", "quota", "-E", "quotatype=usrquota", mount="loop,usrquota") as disk:
        output = disk / "1" / "out"
        output.parent.mkdir()
        os.chown(output.parent, USER, USER)
        inputs = scene.copied(disk / "inputs")
        subprocess.run(["chmod", "-R", "a+rX", str(disk)], check=True)
        limits = struct.pack("=QQQQQQQQI4x", 0, 12, 0, 0, 0, 0, 0, 0, 5)  # of blocks of 1 KiB and of inodes
        found = subprocess.run(["findmnt", "-no", "SOURCE", str(disk)], capture_output=True, text=True, check=True)
        if ctypes.CDLL(None).quotactl(
            0x80000800 - (1 << 32), found.stdout.strip().encode(), USER, limits
        ):  # Q_SETQUOTA, of users
            pytest.skip("the kernel sets no quota here")
        attempt = inputs.attempt(output, setup=f"import os; os.setgid({USER}); os.setuid({USER})")
        assert attempt.code == 5, attempt.words
        assert "quota" in attempt.words
        scene.assert_absent_or_whole(output)
        inputs.assert_finishes(output, kept=ANY)


# -- power cuts


@needs_root
def test_after_a_power_cut_at_any_moment_the_same_command_finishes(scene: Scene, tmp_path: Path) -> None:
    """Nothing that was not made durable survives; an output that was published has."""
    for moment in (*range(3, 90, 9), 0):
        with ext4(tmp_path) as disk:
            output = disk / str(moment) / "out"
            attempt = scene.attempt(output, calls=CHANGES, nth=moment or 10**6, kind="stop")
            assert attempt.code in (None, 0), attempt.words
            fd = os.open(disk, os.O_RDONLY)
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("i", WITHOUT_FLUSH))
            os.close(fd)
            if attempt.code is None:
                scene.parent.signal(attempt.pid, signal.SIGKILL)
        with ext4(tmp_path) as disk:
            output = disk / str(moment) / "out"
            assert output.exists() or moment, "what was published is there"
            ended = {path.name for path in (work_of(output) / "model").glob("*.safetensors")}
            scene.assert_finishes(output, kept=ANY)
            assert ended <= {path.name for path in output.iterdir()}
            shutil.rmtree(output.parent)
