"""Outputs that may not be written: nothing is read, nothing is written, nothing of others is touched."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distmerge
from distmerge import AdapterChoice
from distmerge.errors import InputError, MachineError, UsageError
from distmerge.plan import make_plan
from distmerge.publish import check_output
from distmerge.work import WorkFolder
from tests.attacks.scene import Scene, crafted, failure, header_of, traces
from tests.conftest import environment, tree
from tests.factories import edit_json


@pytest.mark.parametrize(
    "place",
    [
        lambda scene: scene.base,
        lambda scene: scene.base / "out",
        lambda scene: scene.base / "a" / "b",
        lambda scene: scene.base.parent,
        lambda scene: scene.base / ".." / "base",
        lambda scene: scene.adapter,
        lambda scene: scene.adapter / "out",
    ],
    ids=["base", "inside", "deep inside", "around", "by detour", "adapter", "inside adapter"],
)
def test_an_output_that_is_or_holds_or_lies_in_an_input_is_refused(
    scene: Scene, place: Callable[[Scene], Path]
) -> None:
    output = place(scene)
    scene.refuse(output, "base" if "lora" not in str(output) else "adapter", output=output)
    scene.refuse(output, output=output, overwrite=True)


def test_an_input_reached_through_a_link_is_recognised(scene: Scene) -> None:
    link = scene.folder / "link"
    link.symlink_to(scene.base)
    scene.refuse(link, output=link)
    scene.refuse(link / "out", output=link / "out")
    scene.refuse(scene.base, output=scene.base, base=link)


def test_the_second_adapter_is_protected_as_the_first(scene: Scene) -> None:
    other = scene.folder / "other"
    shutil.copytree(scene.adapter, other)
    scene.refuse(other, adapters=(scene.adapter, other), output=other / "out")


def test_an_existing_file_is_refused(scene: Scene) -> None:
    scene.output.write_text("mine")
    scene.refuse(scene.output, "not a folder", hint="--output")
    scene.refuse(scene.output, "not a folder", overwrite=True)


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "out"])
def test_a_link_in_place_of_the_output_is_refused(scene: Scene, target: str) -> None:
    (scene.folder / "elsewhere").mkdir()
    scene.output.symlink_to(target)
    scene.refuse(scene.output, hint="--output")


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "model.safetensors"])
def test_a_foreign_folder_is_refused_even_with_overwrite(scene: Scene, name: str) -> None:
    scene.output.mkdir()
    (scene.output / name).write_text("mine")
    scene.refuse(scene.output, "not written by distmerge", hint="--overwrite")
    scene.refuse(scene.output, "not written by distmerge", overwrite=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 99}', "\x00"])
def test_a_folder_whose_receipt_is_none_is_foreign(scene: Scene, text: str) -> None:
    scene.output.mkdir()
    (scene.output / "merge_receipt.json").write_text(text)
    scene.refuse("merge_receipt.json")
    scene.refuse("merge_receipt.json", overwrite=True)


def test_an_empty_folder_is_as_good_as_none(scene: Scene) -> None:
    scene.output.mkdir()
    scene.merge()
    assert distmerge.verify(scene.output).num_adapter_tensors == 28


@pytest.mark.parametrize("output", [".", "", "..", "/", "x/.."])
def test_an_output_without_a_name_of_its_own_is_refused(
    scene: Scene, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = scene.folder / "cwd"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises((InputError, UsageError)):
        scene.merge(output=Path(output))
    assert list(inside.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 250, "x" * 300, "x/" * 3000])
def test_an_output_whose_name_is_too_long_is_refused_in_words(scene: Scene, name: str) -> None:
    before = traces(scene.folder)
    with pytest.raises((InputError, MachineError, UsageError)) as caught:
        scene.merge(output=scene.folder / name)
    assert "too long" in str(caught.value)
    assert traces(scene.folder) == before


def test_an_output_below_a_file_is_refused_in_words(scene: Scene) -> None:
    (scene.folder / "file").write_text("x")
    before = traces(scene.folder)
    with pytest.raises((InputError, MachineError)):
        scene.merge(output=scene.folder / "file" / "out")
    assert traces(scene.folder) == before


@pytest.mark.parametrize("what", ["folder", "file", "link", "dangling link"])
def test_a_foreign_thing_in_place_of_the_work_folder_is_refused_and_left_alone(scene: Scene, what: str) -> None:
    work = scene.folder / "out.distmerge"
    if what == "folder":
        work.mkdir()
        (work / "notes.txt").write_text("mine")
    elif what == "file":
        work.write_text("mine")
    else:
        (scene.folder / "elsewhere").mkdir()
        if what == "link":
            (scene.folder / "elsewhere" / "notes.txt").write_text("mine")
        work.symlink_to("elsewhere" if what == "link" else "nowhere")
    scene.refuse(work)


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_input_in_place_of_the_work_folder_is_refused_and_left_alone(scene: Scene, which: str) -> None:
    taken = scene.folder / "out.distmerge"
    shutil.move(getattr(scene, which), taken)
    changes = {"base": taken} if which == "base" else {"adapters": (taken,)}
    scene.refuse(taken, **changes)


def test_a_refusal_leaves_a_foreign_work_folder_alone(scene: Scene) -> None:
    work = scene.folder / "out.distmerge"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    scene.spoil_config(r=8)
    scene.refuse("r 4")


def test_a_merge_that_is_done_already_leaves_a_foreign_work_folder_alone(scene: Scene) -> None:
    scene.merge()
    work = scene.folder / "out.distmerge"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    scene.merge()
    assert (work / "notes.txt").read_text() == "mine"


def test_a_finished_output_is_refused_to_another_merge(scene: Scene) -> None:
    scene.merge()
    scene.refuse(scene.output, "another merge", hint="--overwrite", dtype="float32")
    scene.merge(dtype="float32", overwrite=True)
    assert traces(scene.folder)["out/model.safetensors.index.json"]


def test_a_damaged_output_is_refused_with_the_way_on(scene: Scene) -> None:
    scene.merge()
    next(iter(scene.output.glob("*.safetensors"))).unlink()
    scene.refuse(scene.output, "damaged", hint="--overwrite")


def test_a_finished_output_survives_an_overwrite_that_is_refused(scene: Scene) -> None:
    scene.merge()
    scene.spoil_config(lora_alpha=None)
    scene.refuse("lora_alpha", overwrite=True)


def test_an_adapter_is_not_merged_twice(scene: Scene) -> None:
    scene.merge()
    twice = scene.folder / "twice"
    scene.refuse(scene.output, "lora", "already", base=scene.output, output=twice, hint="--base")
    copied = scene.folder / "copied"
    shutil.copytree(scene.adapter, copied)
    scene.refuse("copied", "already", base=scene.output, output=twice, adapters=(copied,))


def test_another_adapter_may_be_merged_into_the_output(scene: Scene) -> None:
    scene.merge()
    scene.spoil_factors(lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    scene.merge(base=scene.output, output=scene.folder / "second")


@pytest.mark.parametrize("budget", [1, 1000, 1 << 20])
def test_a_memory_budget_that_is_too_small_is_refused_with_the_one_that_fits(scene: Scene, budget: int) -> None:
    message = scene.refuse(budget, "--memory-budget", memory_budget=budget, hint="MiB")
    mebibytes = int(message.rsplit("--memory-budget ", 1)[1].removesuffix("MiB"))
    scene.merge(memory_budget=mebibytes << 20)


# -- interrupted runs


def _interrupt(scene: Scene, **changes: Any) -> Path:
    """Leaves the work folder of a merge that was stopped before its first segment."""
    work = WorkFolder(scene.output)
    work.open(make_plan(scene.config(**changes), "cpu"))
    work.release()
    return work.path


def test_an_interrupted_merge_is_finished_by_the_same_command(scene: Scene) -> None:
    work = _interrupt(scene)
    scene.merge()
    assert not work.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float32"}, "--dtype (auto -> float32)"),
        ({"max_shard_size": 100_000}, "--max-shard-size (None -> 100000)"),
        ({"lora_alpha": 3.0}, "--lora-alpha (None -> 3.0)"),
    ],
    ids=["dtype", "shards", "alpha"],
)
def test_an_interrupted_merge_is_refused_to_other_options(scene: Scene, changes: dict[str, Any], named: str) -> None:
    work = _interrupt(scene)
    before = {name: what for name, what in traces(work).items() if name != "status.json"}
    with pytest.raises(InputError) as caught:
        scene.merge(**changes)
    assert named in str(caught.value)
    assert str(work) in caught.value.where
    assert "delete" in caught.value.hint
    assert {name: what for name, what in traces(work).items() if name != "status.json"} == before
    scene.merge()


def _other_weight(scene: Scene) -> dict[str, Any]:
    return {"adapters": (AdapterChoice(folder=scene.adapter, weight=0.5),)}


def _other_factors(scene: Scene) -> dict[str, Any]:
    scene.spoil_factors(lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    return {}


def _other_config(scene: Scene) -> dict[str, Any]:
    scene.spoil_config(lora_alpha=7)
    return {}


def _other_base(scene: Scene) -> dict[str, Any]:
    os.utime(scene.shard, (1, 1))
    return {}


def _second_adapter(scene: Scene) -> dict[str, Any]:
    return {"adapters": (scene.adapter, scene.adapter)}


def _other_side_file(scene: Scene) -> dict[str, Any]:
    (scene.base / "tokenizer.json").write_text("{}")
    return {}


def _other_configuration(scene: Scene) -> dict[str, Any]:
    edit_json(scene.base / "config.json", note="new")
    return {"dtype": "auto"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_weight, "adapter 1 --weight (1.0 -> 0.5)"),
        (_other_factors, "adapter 1 (weights"),
        (_other_config, "adapter 1 (weights"),
        (_other_base, "base model-00001-of"),
        (_second_adapter, "adapter 2 (absent -> weights"),
        (_other_side_file, "side files"),
    ],
)
def test_an_interrupted_merge_is_refused_to_other_inputs(
    scene: Scene, change: Callable[[Scene], dict[str, Any]], named: str
) -> None:
    _interrupt(scene)
    changes = change(scene)
    with pytest.raises(InputError) as caught:
        scene.merge(**changes)
    assert named in str(caught.value)
    assert not scene.output.exists()


def test_a_configuration_that_changed_meanwhile_does_not_go_unnoticed(scene: Scene) -> None:
    _interrupt(scene)
    _other_configuration(scene)
    with pytest.raises(InputError):
        scene.merge()


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"version": 1, "plan": {}}', b'{"plan": []}', b"\xff", b'{"plan":' * 50_000]
)
def test_a_spoiled_manifest_is_refused_by_name(scene: Scene, text: bytes) -> None:
    work = _interrupt(scene)
    (work / "manifest.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        scene.merge()
    assert str(work) in str(caught.value)
    assert "delete" in caught.value.hint
    assert not scene.output.exists()


def test_a_manifest_that_names_other_places_writes_nothing_there(scene: Scene) -> None:
    work = _interrupt(scene)
    manifest = (work / "manifest.json").read_text()
    first = scene.shard.name
    (work / "manifest.json").write_text(manifest.replace(first, f"../../{first}"))
    with pytest.raises(InputError):
        scene.merge()
    assert not (scene.folder / first).exists()


@pytest.mark.parametrize("lines", [b"{", b"\x00\xff\n", b"null\n[]\n5\n", b'{"plan": 1}\n', b"[" * 50_000])
def test_spoiled_journals_count_for_nothing(scene: Scene, lines: bytes) -> None:
    work = _interrupt(scene)
    (work / "done").mkdir(exist_ok=True)
    (work / "done" / "x.jsonl").write_bytes(lines)
    scene.merge()
    distmerge.verify(scene.output, base=scene.base, adapters=(AdapterChoice(folder=scene.adapter),))


@pytest.mark.parametrize("what", ["cut", "long", "noise", "gone", "link"])
def test_a_spoiled_unfinished_file_is_written_anew(scene: Scene, what: str) -> None:
    work = _interrupt(scene)
    part = sorted((work / "model").glob("*.part"))[0]
    if what == "cut":
        os.truncate(part, 10)
    elif what == "long":
        os.truncate(part, 10_000_000)
    elif what == "noise":
        part.write_bytes(os.urandom(part.stat().st_size))
    else:
        part.unlink()
    if what == "link":
        part.symlink_to(scene.shard)
        with pytest.raises((InputError, MachineError)):
            scene.merge()
        return
    scene.merge()
    distmerge.verify(scene.output, base=scene.base, adapters=(AdapterChoice(folder=scene.adapter),))


# -- no room


def test_an_output_larger_than_the_disk_is_refused_before_anything_is_written(scene: Scene) -> None:
    nbytes = 8 << 40
    header = header_of({"huge": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}})
    huge = scene.base / "model-huge.safetensors"
    try:
        with huge.open("wb") as file:  # sparse: takes no room
            file.write(crafted(header))
            file.truncate(8 + len(header) + nbytes)
    except OSError:
        pytest.skip("the file system has no files of 8 TiB")
    if shutil.disk_usage(scene.folder).free > nbytes:
        pytest.skip("the disk is larger than 8 TiB")
    scene.spoil_weight_map(lambda weight_map: {**weight_map, "huge": huge.name})
    scene.refuse("free", error=MachineError, hint="--output")
    scene.refuse("free", error=MachineError, output=scene.folder / "new" / "folder" / "out")


def test_a_write_that_fails_ends_with_words_and_resumes(scene: Scene) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    command = [sys.executable, "-m", "distmerge", "merge", "--base", scene.base, "--adapter", scene.adapter]
    command += ["--output", scene.output, "--device", "cpu", "--nproc", "1"]
    done = subprocess.run(
        list(map(str, command)),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=120,
    )
    assert done.returncode == 5, done.stderr
    assert "ulimit -f" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not scene.output.exists()
    scene.merge()


# -- inputs


@pytest.mark.parametrize("changes", [{}, {"dtype": "float16"}, {"max_shard_size": 50_000}, {"memory_budget": 1}])
def test_inputs_are_never_written_to(scene: Scene, changes: dict[str, Any]) -> None:
    def stamps(folder: Path) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}

    before = [(tree(folder), stamps(folder)) for folder in (scene.base, scene.adapter)]
    try:
        scene.merge(**changes)
    except InputError:
        assert "memory_budget" in changes
    assert [(tree(folder), stamps(folder)) for folder in (scene.base, scene.adapter)] == before


def test_read_only_inputs_are_enough(scene: Scene) -> None:
    for folder in (scene.base, scene.adapter):
        for path in folder.rglob("*"):
            path.chmod(0o444)
        folder.chmod(0o555)
    try:
        scene.merge()
        assert (scene.output / "config.json").stat().st_mode & 0o200
    finally:
        scene.base.chmod(0o755)
        scene.adapter.chmod(0o755)


@pytest.mark.parametrize("name", ["with space", "a'b", "ünïcode", "-dash", "[red]x", "a\nb", "percent%s", "a|b`c"])
def test_folders_of_any_printable_name_are_inputs(scene: Scene, name: str) -> None:
    renamed = scene.folder / name
    shutil.move(scene.adapter, renamed)
    scene.merge(adapters=(renamed,), output=scene.folder / f"{name} out")


def test_a_folder_name_that_is_no_utf_8_is_an_input_or_refused(scene: Scene) -> None:
    renamed = Path(os.fsdecode(os.fsencode(scene.folder) + b"/lora\xff"))
    shutil.move(scene.adapter, renamed)
    error = failure(lambda: scene.merge(adapters=(renamed,)))
    assert error is None or (error.exit_code == 3 and "lora" in str(error))


@pytest.mark.parametrize("place", ["/dev/shm", "/proc", "/"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mount_point_is_refused_before_anything_is_read(scene: Scene, place: str, overwrite: bool) -> None:
    if not os.path.ismount(place):
        pytest.skip(f"{place} is no mount point here")
    nowhere = scene.folder / "nowhere"
    with pytest.raises(InputError, match="is a mount point" if place != "/" else "is no name") as caught:
        check_output(scene.config(output=Path(place), base=nowhere, adapters=(nowhere,), overwrite=overwrite))
    assert caught.value.exit_code == 3
