"""Room and memory: what is needed and what is there is said before the first byte, and while others take it."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import distmerge
from distmerge import AdapterChoice, MergeConfig, room
from distmerge.errors import MachineError
from distmerge.plan import Plan, count_lanes, make_plan
from distmerge.report.table import plan_facts, plan_table
from distmerge.room import RoomWatch, check_room, files_needed, room_needed
from distmerge.storage.memory import Limit
from distmerge.stream import Stream
from tests.conftest import tree
from tests.factories import merge


@pytest.fixture(scope="module")
def plan(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(config_for(base, adapter, tmp_path_factory.mktemp("nothing") / "out"), "cpu")


def config_for(base: Path, adapter: Path, output: Path, **options: Any) -> MergeConfig:
    return MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output, device="cpu", **options)


def usage(monkeypatch: pytest.MonkeyPatch, **fields: int) -> None:
    """Makes the file system tell this of itself."""
    real = os.statvfs("/")
    names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_flag")
    told = os.statvfs_result([fields.get(name, getattr(real, name)) for name in (*names, "f_namemax")])
    monkeypatch.setattr(os, "statvfs", lambda _: told)


def test_a_file_system_without_room_for_the_files_is_refused_before_the_first_byte(
    base: Path, adapter: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = files_needed(plan)
    usage(monkeypatch, f_files=1000, f_favail=needed - 1)
    with pytest.raises(MachineError, match=rf"needs {needed} files more, .* room for {needed - 1} \(inodes\)"):
        merge(base, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    facts = plan_facts(plan, config_for(base, adapter, tmp_path / "out"), wanted_lanes=1, room_nbytes=1, nproc=1)
    assert f"there is room for {needed - 1} (inodes)" in plan_table(facts)
    usage(monkeypatch, f_files=0, f_favail=0)  # it has as many as it wants
    check_room(plan, tmp_path / "out", tmp_path / "model")


def test_a_merge_never_makes_more_files_than_it_asks_room_for(
    base: Path, adapter: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    begin = Stream.begin

    def counted(self: Stream, *args: Any) -> Any:
        nonlocal most
        most = max(most, sum(1 for _ in tmp_path.rglob("*")))
        return begin(self, *args)

    monkeypatch.setattr(Stream, "begin", counted)
    merge(base, adapter, tmp_path / "out")
    assert len(plan.files) < max(most, sum(1 for _ in tmp_path.rglob("*"))) <= files_needed(plan)


def test_what_an_earlier_run_has_written_is_not_asked_for_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage(monkeypatch, f_frsize=1, f_bavail=room_needed(plan) - 4096, f_files=0)
    with pytest.raises(MachineError, match=f"needs {room_needed(plan):,} bytes more, .* are free"):
        check_room(plan, tmp_path / "out", tmp_path)
    (tmp_path / "model.safetensors.part").write_bytes(b"\1" * 4096)
    check_room(plan, tmp_path / "out", tmp_path)


def test_a_run_whose_room_is_taken_stops_with_what_is_missing_and_resumes(
    base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as inside:
        inside.setattr(room, "_WATCH_SECONDS", -1.0)
        begin = Stream.begin

        def filled(self: Stream, number: int, *args: Any) -> Any:
            if number:
                usage(inside, f_frsize=1, f_bavail=0)
            return begin(self, number, *args)

        inside.setattr(Stream, "begin", filled)
        inside.setattr("distmerge.work.allocate", lambda fd, nbytes, *_: os.ftruncate(fd, nbytes))  # reserves nothing
        with pytest.raises(MachineError, match=r"still need [\d,]+ bytes, 0 are free") as caught:
            merge(base, adapter, tmp_path / "out")
    assert caught.value.where == str(tmp_path)
    assert "resumes" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert tree(merge(base, adapter, tmp_path / "out")) == tree(merged)


@pytest.mark.parametrize("reserved", [True, False])
def test_neither_what_was_reserved_nor_what_was_written_is_missing(
    reserved: bool, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "model.safetensors.part"
    with part.open("wb") as file:
        file.truncate(plan.nbytes_to_write)
        if reserved:
            os.posix_fallocate(file.fileno(), 0, plan.nbytes_to_write)
    watch = RoomWatch(plan, tmp_path / "out", tmp_path)
    usage(monkeypatch, f_frsize=1, f_bavail=0)
    watch.check(plan.nbytes_to_write)
    if reserved:
        watch.check(0)
        return
    with pytest.raises(MachineError, match=f"still need {plan.nbytes_to_write - 9:,} bytes"):
        watch.check(9)


def test_what_is_written_while_the_file_system_is_looked_at_is_not_missing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def left() -> int:
        """What is free, once a lane has written some more."""
        nonlocal written
        with (tmp_path / "model.safetensors.part").open("ab") as file:
            file.write(b"\1" * 4096)
        written += 4096
        return plan.nbytes_to_write - written

    monkeypatch.setattr(room, "free_nbytes", lambda _: left())
    watch = RoomWatch(plan, tmp_path / "out", tmp_path)
    for _ in range(3):
        watch.check(0)


# -- memory


@pytest.mark.parametrize("shared", [True, False])
def test_too_little_memory_is_refused_with_what_is_needed_and_what_there_is(
    shared: bool, *, base: Path, adapter: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = plan.least_nbytes - 1
    mapped = 0 if shared else max(file.nbytes for file in plan.files)
    limit = Limit(name="the control group x", nbytes=1 << 40, left=left + mapped, shared=shared)
    monkeypatch.setattr("distmerge.storage.memory.memory_limits", lambda: [limit])
    with pytest.raises(MachineError) as caught:
        distmerge.merge(config_for(base, adapter, tmp_path / "out", nproc=1))
    for words in (f"needs {left + 1:,} bytes", f"the control group x of {1 << 40:,} leaves {left:,}"):
        assert words in caught.value.what
    assert list(tmp_path.iterdir()) == []
    if shared:
        facts = plan_facts(plan, config_for(base, adapter, tmp_path / "out"), wanted_lanes=1, room_nbytes=1, nproc=1)
        assert "the control group x leaves" in plan_table(facts)


def test_a_rank_takes_no_more_lanes_than_the_memory_that_is_left_holds(
    base: Path, adapter: Path, *, merged: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = plan.least_nbytes + 2 * (plan.lane_nbytes + plan.held_nbytes)
    assert (count_lanes(plan, left, wanted=9), count_lanes(plan, left - 1, wanted=9)) == (3, 2)
    limits = [
        Limit(name="a", nbytes=1 << 40, left=2 * left, shared=True),
        Limit(name="b", nbytes=1 << 40, left=1 << 39, shared=True),
    ]
    monkeypatch.setattr("distmerge.storage.memory.memory_limits", lambda: limits)
    from distmerge.budget import budget_here

    assert [budget_here(plan, 1 << 38, ranks) for ranks in (1, 2)] == [2 * left, left]
    assert budget_here(plan, 5, 1) == 5, "what was asked for is never exceeded"
    least = plan.least_nbytes
    limits[0] = dataclasses.replace(limits[0], left=least)
    assert budget_here(plan, 1 << 38, 4, begun=True) == least, "others have taken their parts before"
    limits[0] = dataclasses.replace(limits[0], left=least - 1)
    with pytest.raises(MachineError, match=f"leaves {least - 1:,} to each of 1"):
        budget_here(plan, 1 << 38, 4, begun=True)
    limits[0] = dataclasses.replace(limits[0], left=left)
    monkeypatch.setattr("distmerge.share.wanted_lanes", lambda _: 9)
    before = threading.active_count()
    seen: set[int] = set()
    begin = Stream.begin

    def noted(self: Stream, *args: Any) -> Any:
        seen.add(len(self.clocks))
        return begin(self, *args)

    monkeypatch.setattr(Stream, "begin", noted)
    assert tree(merge(base, adapter, tmp_path / "out")) == tree(merged)
    assert seen == {3}
    assert threading.active_count() == before
