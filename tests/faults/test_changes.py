"""What others do to inputs, output and work folder while a merge runs, or between two runs of it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distmerge.work import WorkFolder
from tests.conftest import tree
from tests.faults.attempts import ANY, CHANGES, Attempt, Scene, work_of

MOMENTS = (3, 25, 45, 70)  # of about 90 calls that change a file
Harm = Callable[[Path, Path], None]  # the output and a folder beside it


def disturbed(scene: Scene, output: Path, moment: int, harm: Callable[[], None], **fault: object) -> Attempt:
    """A merge that stood still at a moment, while `harm` was done."""
    stopped = scene.attempt(output, calls=CHANGES, nth=moment, kind="stop")
    assert stopped.code is None, stopped.words
    harm()
    return scene.parent.signal(stopped.pid, signal.SIGCONT)


def replace_by_link(path: Path, target: Path) -> None:
    if path.exists():
        path.rename(path.with_name("aside"))
    path.symlink_to(target)


OUTSIDE: dict[str, Harm] = {
    "the work folder deleted": lambda out, _: shutil.rmtree(work_of(out)),
    "the model deleted": lambda out, _: shutil.rmtree(work_of(out) / "model", ignore_errors=True),
    "the journals deleted": lambda out, _: shutil.rmtree(work_of(out) / "done", ignore_errors=True),
    "the work folder a link": lambda out, victim: replace_by_link(work_of(out), victim),
    "the output a link": replace_by_link,
    "the output made by others": lambda out, _: (out.mkdir(), (out / "notes.txt").write_text("mine"))[0],
    "the output a file": lambda out, _: out.write_text("mine"),
}


@pytest.mark.parametrize("harm", OUTSIDE)
def test_what_others_put_in_the_way_ends_the_merge_in_words_and_nothing_is_written_elsewhere(
    harm: str, scene: Scene, room: Path
) -> None:
    for moment in MOMENTS if harm != "the work folder a link" else MOMENTS[1:]:  # once it is known as ours
        output, victim = room / str(moment) / "out", room / f"victim{moment}"
        victim.mkdir()
        (victim / "notes.txt").write_text("not of this model")
        before = tree(victim)
        attempt = disturbed(scene, output, moment, lambda at=output, to=victim: OUTSIDE[harm](at, to))
        assert attempt.code in (0, 4, 5), (moment, attempt.words)
        assert attempt.said_well(), (moment, attempt.words)
        assert tree(victim) == before, moment
        if output.is_symlink() or output.is_file():
            output.unlink()
        elif (output / "notes.txt").exists():
            assert tree(output).keys() == {"notes.txt"}
            shutil.rmtree(output)
        if work_of(output).is_symlink():
            refused = scene.attempt(output)
            assert (refused.code, tree(victim)) == (3, before), refused.words
            work_of(output).unlink()
        shutil.rmtree(output.with_name("aside"), ignore_errors=True)
        scene.assert_finishes(output, kept=ANY)


def test_a_work_folder_that_has_become_a_link_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "notes.txt").write_text("not of this model")
    work = WorkFolder(tmp_path / "out")
    work.path.symlink_to(tmp_path / "victim")
    work.discard()
    assert (tmp_path / "victim" / "notes.txt").exists()


@pytest.mark.parametrize("what", ["truncated", "replaced", "gone"])
@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_an_input_that_changes_while_it_is_read_is_named_or_was_read_already(
    what: str, kind: str, scene: Scene, room: Path
) -> None:
    for moment in (12, 30, 45):
        copied = scene.copied(room / f"inputs{moment}")
        path = max((copied.base if kind == "base" else copied.adapter).glob("*.safetensors"))

        def change(path: Path = path) -> None:
            content = path.read_bytes()
            if what == "truncated":
                os.truncate(path, len(content) // 2)
            else:
                path.rename(path.with_name("before"))
            if what == "replaced":
                path.write_bytes(content[:-100] + bytes(100))

        output = room / str(moment) / "out"
        attempt = disturbed(copied, output, moment, change)
        assert attempt.code in (0, 3, 5), attempt.words
        assert attempt.said_well(), attempt.words
        assert attempt.code == 0 or path.parent.name in attempt.errors[0]
        copied.assert_absent_or_whole(output)
        if what != "replaced":
            assert attempt.code == 0 or copied.attempt(output).code != 0, "what is missing is still missing"
        else:
            assert attempt.code != 0, "a mixture of two is not published"
            assert copied.attempt(output).code in (0, 3), "the new ones are merged, or refused as others"


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_between_runs_a_changed_input_is_refused_and_the_right_one_finishes(
    what: str, scene: Scene, room: Path
) -> None:
    output, copied = room / "1" / "out", scene.copied(room / "inputs")
    assert copied.attempt(output, calls=CHANGES, nth=50, kind="kill").code == -signal.SIGKILL
    path = max((copied.base if what == "base" else copied.adapter).glob("*.safetensors"))
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    refused = copied.attempt(output)
    assert refused.code == 3
    assert "of other inputs or options" in refused.words
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    finished = copied.attempt(output)
    assert (finished.code, tree(output)) == (0, scene.expected), finished.words
    assert finished.num_kept > 0


# -- what was finished, and is no longer what it was


def rot(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


ROT: dict[str, Callable[[Path], object]] = {
    "a flipped bit in its first segment": lambda path: rot(path, 1000),
    "a flipped bit in its last byte": lambda path: rot(path, -1),
    "a flipped bit in its header": lambda path: rot(path, 20),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 5),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 5),
    "gone": lambda path: path.unlink(),
    "back under its unfinished name": lambda path: path.rename(f"{path}.part"),
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture(scope="module")
def whole(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that was killed when both files were whole and recorded: the output that it would have had."""
    output = tmp_path_factory.mktemp("whole") / "1" / "out"
    attempt = scene.attempt(output, calls=("rename",), nth=3, kind="kill", below=work_of(output) / "model")
    assert attempt.code == -signal.SIGKILL
    assert len(list(work_of(output).glob("model/*.safetensors"))) == 2
    return output


@pytest.mark.parametrize("harm", [*ROT, "no record"])
def test_a_finished_file_that_is_no_longer_what_it_was_is_made_whole_again(
    harm: str, scene: Scene, whole: Path, room: Path
) -> None:
    output = room / "1" / "out"
    shutil.copytree(whole.parent, output.parent)
    if harm == "no record":
        for journal in work_of(output).glob("done/*.jsonl"):
            journal.write_text("".join(line for line in journal.open() if '"shard"' not in line))
    else:
        ROT[harm](min(work_of(output).glob("model/*.safetensors")))
    again = scene.attempt(output)
    assert (again.code, tree(output)) == (0, scene.expected), again.words
    number = len(scene.recorded(whole))
    if harm in ("no record", "a flipped bit in its header", "longer", "back under its unfinished name"):
        assert again.num_kept == number, "its segments are what they were"
    else:
        assert number // 2 <= again.num_kept < number, "only what was lost is done again"


def test_a_finished_file_of_zeros_that_is_gone_is_made_again(scene: Scene, room: Path) -> None:
    """Its new, empty file has the checksums of the old one."""
    zeros = scene.of_zeros(room / "inputs")
    output = room / "1" / "out"
    killed = zeros.attempt(output, calls=("rename",), nth=3, kind="kill", below=work_of(output) / "model")
    assert killed.code == -signal.SIGKILL
    for path in work_of(output).glob("model/*.safetensors"):
        path.unlink()
    again = zeros.attempt(output)
    assert again.code == 0, again.words
    assert all(any(path.read_bytes()) for path in output.glob("*.safetensors"))
