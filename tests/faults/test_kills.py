"""Law 5, call by call: killed before any call that changes a file, or in the middle of a write, the same command
finishes, and does nothing again that was recorded."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.attempts import CHANGES, Scene


@pytest.mark.parametrize(
    "calls", [("write",), ("create", "mkdir"), ("fsync", "syncdir"), ("rename", "unlink"), CHANGES[7:]]
)
def test_killed_before_any_call_that_changes_a_file_the_same_command_finishes(
    calls: tuple[str, ...], scene: Scene, room: Path
) -> None:
    for number, output, attempt in scene.each(room, calls=calls, kind="kill"):
        assert attempt.code == -signal.SIGKILL, number
        scene.assert_finishes(output)


def test_killed_in_the_middle_of_any_write_the_same_command_finishes(scene: Scene, room: Path) -> None:
    for _, output, _ in scene.each(room, calls=("write",), kind="tear"):
        scene.assert_finishes(output)


def test_killed_again_and_again_the_same_command_finishes(scene: Scene, room: Path) -> None:
    output = room / "out"
    for nth in range(30, 0, -1):  # ever earlier, so that none gets further than the one before
        attempt = scene.attempt(output, calls=CHANGES, nth=nth, kind="kill")
        scene.assert_absent_or_whole(output)
        if attempt.code == 0:
            break
    scene.assert_finishes(output)
