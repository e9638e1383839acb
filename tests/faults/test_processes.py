"""Signals, closed streams, clocks that jump, and locks that do nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import tree
from tests.faults.attempts import ANY, CHANGES, Scene, can_mount, work_of

NO_LOCKS = "import fcntl; fcntl.flock = lambda *_: None"
STREAMS = {
    "stdout closed": "import os; os.close(1)",
    "nobody reads stdout": "import os; r, w = os.pipe(); os.dup2(w, 1); os.close(r)",
    "nobody reads stderr": "import os; r, w = os.pipe(); os.dup2(w, 2); os.close(r)",
    "all closed": "import os; [os.close(n) for n in (0, 1, 2)]",
    "the terminal is gone": "import os; m, s = os.openpty(); [os.dup2(s, n) for n in (0, 1, 2)]; os.close(m)",
}
CLOCKS = {
    "an hour ahead": "import time; real = time.time; time.time = lambda: real() + 3600",
    "jumping by an hour": (
        "import itertools, time\nreal, skew = time.time, itertools.cycle((0, 3600, -3600))\n"
        "time.time = lambda: real() + next(skew)"
    ),
}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_a_signal_at_any_moment_is_exit_75_once_and_the_same_command_finishes(
    name: str, scene: Scene, room: Path
) -> None:
    codes = []
    for moment in (5, 20, 35, 50, 80):
        output = room / str(moment) / "out"
        stopped = scene.attempt(output, calls=CHANGES, nth=moment, kind="stop")
        assert stopped.code is None, stopped.words
        attempt = scene.parent.signal(stopped.pid, getattr(signal, name), signal.SIGCONT)
        assert attempt.code in (0, 75), attempt.words
        assert attempt.said_well(), attempt.words
        assert attempt.code == 0 or attempt.errors == [f"error: stopped by {name}"]
        scene.assert_finishes(output)
        codes.append(attempt.code)
    assert codes.count(75) >= 3


@pytest.mark.parametrize("streams", STREAMS)
def test_a_merge_that_nobody_listens_to_is_finished(streams: str, scene: Scene, room: Path) -> None:
    attempt = scene.attempt(room / "1" / "out", setup=STREAMS[streams])
    assert attempt.code == 0, attempt.words
    scene.assert_absent_or_whole(room / "1" / "out")
    assert (room / "1" / "out").exists()


@pytest.mark.parametrize("clock", CLOCKS)
def test_clocks_do_not_matter(clock: str, scene: Scene, room: Path) -> None:
    output = room / "1" / "out"
    assert scene.attempt(output, calls=CHANGES, nth=45, kind="kill").code == -signal.SIGKILL
    for path in work_of(output).rglob("*"):
        os.utime(path, (4e9, 4e9))  # a server whose clock is decades ahead
    number = len(scene.recorded(output))
    attempt = scene.attempt(output, "--run-log", room / "log", setup=CLOCKS[clock])
    assert (attempt.code, attempt.num_kept) == (0, number), attempt.words
    scene.assert_absent_or_whole(output)


def test_two_launches_whose_locks_do_nothing_harm_nobody(scene: Scene, room: Path) -> None:
    """One stands still, then the other; the first goes on to its end, then the second."""
    for first in (4, 20, 40, 60, 80):
        for second in (4, 20, 40, 60, 80):
            output = room / f"{first}-{second}" / "out"
            one = scene.attempt(output, calls=CHANGES, nth=first, kind="stop", setup=NO_LOCKS)
            two = scene.attempt(output, calls=CHANGES, nth=second, kind="stop", setup=NO_LOCKS)
            codes = []
            for stopped in (one, two):
                attempt = stopped
                while attempt.code is None:
                    attempt = scene.parent.signal(attempt.pid, signal.SIGCONT)
                assert attempt.code in (0, 3, 4, 5), attempt.words
                assert attempt.said_well(), attempt.words
                codes.append(attempt.code)
                scene.assert_absent_or_whole(output)
            assert 0 in codes or not output.exists()
            scene.assert_finishes(output, kept=ANY)


@pytest.mark.skipif(not can_mount(), reason="giving a folder to another group needs root")
def test_a_folder_that_gives_its_group_to_what_is_made_in_it_does_so(scene: Scene, room: Path) -> None:
    parent = room / "1"
    parent.mkdir()
    os.chown(parent, -1, 65534)
    parent.chmod(0o2775)
    assert scene.attempt(parent / "out", setup="import os; os.umask(0o002)").code == 0
    for path in (parent / "out", *(parent / "out").rglob("*")):
        found = path.stat()
        assert found.st_gid == 65534
        assert found.st_mode & 0o7777 == (0o2775 if path.is_dir() else 0o664), path
    assert tree(parent / "out") == scene.expected
