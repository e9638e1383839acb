"""Calls that fail, one after another: the merge ends in words, or goes on; then the same command finishes."""

from __future__ import annotations

import errno
from os.path import basename as base
from pathlib import Path

import pytest

from tests.faults.attempts import ANY, CHANGES, Scene

# What a call may fail with: the first of its calls with the first of them, the second with the second, and so on.
CODES = {
    "create": ("ENOSPC", "EDQUOT", "EMFILE", "EROFS", "EACCES", "EIO", "ESTALE", "ENFILE"),
    "open": ("EMFILE", "ESTALE", "EIO", "ENFILE"),
    "write": ("ENOSPC", "EIO", "EDQUOT", "EFBIG", "EROFS", "ESTALE", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "syncdir": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EACCES"),
    "unlink": ("EIO", "EROFS"),
    "mkdir": ("ENOSPC", "EDQUOT", "EROFS", "EACCES"),
    "ftruncate": ("EIO", "EFBIG"),
    "fallocate": ("ENOSPC", "EDQUOT", "EFBIG"),
    "sync_file_range": ("EIO", "ENOSPC"),
    "close": ("EIO", "EDQUOT"),
}
COURTESIES = ("status", "events", "sync_file_range", "unlink")  # what may fail and the merge goes on


@pytest.mark.parametrize("call", CODES)
def test_a_call_that_fails_is_said_in_words_and_the_same_command_finishes(call: str, scene: Scene, room: Path) -> None:
    names = CODES[call]
    codes = [getattr(errno, name) for name in names]
    kind = "done" if call == "close" else "fail"
    exits = []
    for number, output, attempt in scene.each(room, calls=(call,), kind=kind, codes=codes):
        name = names[(number - 1) % len(names)]
        assert attempt.code in (0, 5), attempt.words
        assert attempt.said_well(), attempt.words
        assert attempt.code == 0 or name in attempt.words or "safetensors library cannot open" in attempt.words
        assert attempt.code == 0 or "/out" in attempt.errors[0] or ".safetensors" in attempt.errors[0], "it is named"
        scene.assert_finishes(output, kept=ANY if call == "fsync" else None)
        exits.append(attempt.code)
    assert (set(exits) == {0}) == (call in COURTESIES), "what a merge needs must not fail in silence"


def test_a_sync_that_failed_is_not_tried_again_on_the_same_file(scene: Scene, room: Path) -> None:
    # The kernel forgets what it could not write: a second fsync would tell of success (PostgreSQL, 2018).
    for number, output, attempt in scene.each(room / "each", calls=("fsync",), kind="fail", codes=[errno.EIO]):
        log = room / f"{number}.log"
        again = scene.attempt(output.with_name("again"), calls=("fsync",), nth=number, kind="fail", code=5, log=log)
        synced = [line.split("\t")[1] for line in log.read_text().splitlines() if line.startswith("fsync\t")]
        assert attempt.code == again.code == 5
        failed = synced[number - 1]
        assert failed not in synced[number:], "what failed is given up"
        assert not Path(failed).exists() or failed.endswith(".jsonl"), "and its bytes are made anew"


@pytest.mark.parametrize("fault", ["EINTR", "short"])
def test_calls_that_are_cut_short_are_taken_up_again(fault: str, scene: Scene, room: Path) -> None:
    output = room / "out"
    code, kind = (errno.EINTR, "fail") if fault == "EINTR" else (0, "short")
    calls = ("write", "read") if fault == "short" else ("write", "read", "open", "create", "fsync", "fallocate")
    for nth in range(1, 60, 3) if fault == "EINTR" else (0,):  # not each of them: that would never end
        attempt = scene.attempt(output, calls=calls, nth=nth, kind=kind, code=code)
        assert attempt.code == 0, attempt.words
        assert attempt.hits
        scene.assert_absent_or_whole(output)
        if nth:
            scene.remove(output)


def test_reads_of_inputs_that_are_cut_short_are_taken_up_again(scene: Scene, room: Path) -> None:
    attempt = scene.attempt(room / "out", calls=("read",), kind="short", below=scene.base.parent)
    assert attempt.code == 0, attempt.words
    assert attempt.hits > 20
    scene.assert_absent_or_whole(room / "out")


@pytest.mark.parametrize("call", ["read", "open"])
def test_an_input_that_cannot_be_read_is_named_and_is_the_machines_fault(call: str, scene: Scene, room: Path) -> None:
    codes = [errno.EIO, errno.ESTALE, *([errno.EMFILE] if call == "open" else [])]
    for _, output, attempt in scene.each(room, calls=(call,), kind="fail", codes=codes, below=scene.base.parent):
        assert attempt.code == 5, attempt.words
        assert attempt.said_well(), attempt.words
        assert str(scene.base.parent) in attempt.errors[0]
        assert "hint: " in attempt.words
        scene.assert_finishes(output)


# -- what network file systems do


def test_a_folder_that_cannot_be_synced_is_left_alone(scene: Scene, room: Path) -> None:
    attempt = scene.attempt(room / "out", calls=("syncdir",), kind="fail", code=errno.EINVAL)
    assert attempt.code == 0, attempt.words
    assert attempt.hits > 5
    scene.assert_absent_or_whole(room / "out")


def test_a_rename_that_is_said_to_have_failed_and_has_happened_is_taken_for_done(scene: Scene, room: Path) -> None:
    for number, output, attempt in scene.each(room, calls=("rename",), kind="done", codes=[errno.EIO]):
        assert attempt.code == 0, (number, attempt.words)
        scene.assert_absent_or_whole(output)
        assert output.exists()


def test_no_link_is_ever_made(scene: Scene, room: Path) -> None:
    attempt = scene.attempt(room / "out", calls=("link",), kind="fail", code=errno.EPERM)
    assert (attempt.code, attempt.hits) == (0, 0), "FAT, CIFS and some file servers have none"


# -- what is lost in silence


def test_a_write_that_is_lost_in_silence_is_found_before_anything_is_published(scene: Scene, room: Path) -> None:
    codes = []
    for _, output, attempt in scene.each(room, calls=("write",), kind="lose"):
        assert attempt.code in (0, 4), attempt.words
        assert attempt.said_well(), attempt.words
        scene.assert_absent_or_whole(output)
        assert output.exists() == (attempt.code == 0)
        scene.assert_finishes(output, kept=ANY)
        codes.append(attempt.code)
    assert codes.count(4) > 10


def test_every_file_is_durable_before_it_gets_its_name_and_its_name_before_the_next_step(
    scene: Scene, room: Path
) -> None:
    """From the calls alone: a file is synced after its last write and before it is renamed; the folder that has its new
    name is synced before the folder above it is renamed, and before the run ends."""
    output = room / "out"
    assert scene.attempt(output, calls=CHANGES, log=room / "log", below=room).code == 0
    unsynced, unnamed = dict[str, str](), dict[str, str]()
    names, records = list[str](), 0
    for line in (room / "log").read_text().splitlines():
        call, path, target = line.split("\t")
        if "/.status." in path or path.endswith("events.jsonl"):
            continue  # for people
        if call in ("write", "ftruncate", "fallocate", "copy_file_range"):
            unsynced[path] = call
        elif call == "fsync":
            unsynced.pop(path, None)
            records += path.endswith(".jsonl")  # of a file that is whole
            durable = [name for name in names if name.endswith(".safetensors") and name not in map(base, unnamed)]
            assert len(durable) >= records, "a file is recorded before its name is on disk"
        elif call == "syncdir":
            unnamed = {name: folder for name, folder in unnamed.items() if folder != path}
        elif call == "rename":
            assert path not in unsynced, f"{path} gets its name before its bytes are on disk"
            inside = [name for name in (*unsynced, *unnamed) if name.startswith(f"{path}/")]
            assert not inside, f"{path} is renamed before {inside} are on disk"
            unnamed[target] = str(Path(target).parent)
            names.append(Path(target).name)
        elif call == "create" and path.endswith(".jsonl"):
            unnamed[path] = str(Path(path).parent)
    assert not unsynced
    assert not unnamed, "the run ends before these names are on disk"
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) == 2
    assert names[-2:] == ["model.safetensors.index.json", "out"], "the index is last, then one rename publishes"
