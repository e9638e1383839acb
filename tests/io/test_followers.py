"""Files that are read back while they are written, whichever ranks write them, and what a later run keeps of them."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from torch._C._distributed_c10d import HashStore

from distmerge import follower
from distmerge.errors import InputError, Interrupted, MachineError, VerifyError
from distmerge.follower import Followers
from distmerge.journal import ShardRecord
from distmerge.merge import merge as merge_ranks
from distmerge.plan import Plan, make_plan
from distmerge.progress import Display
from distmerge.stream import Running, SegmentRecord, Stream
from distmerge.work import WorkFolder
from distmerge.world import Place, World
from tests.conftest import digests, tree
from tests.factories import merge, plan_of, synthetic_adapter, synthetic_base, wanted
from tests.io.test_digests import KINDS, config_for, receipt
from tests.io.test_resume import stream_of


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of two files with several segments each, and an adapter."""
    folder = tmp_path_factory.mktemp("long")
    base = synthetic_base(folder / "base", layers=2, hidden=1024, inner=6000)
    return base, synthetic_adapter(folder / "lora", base, r=2)


# -- reading back


@pytest.mark.parametrize("kind", KINDS)
def test_only_hashes_read_back_what_was_written_and_each_byte_once(
    kind: str, long: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[tuple[int, int]]] = {}
    real = follower.read_exact

    def noted(fd: int, view: memoryview, offset: int, where: str) -> None:
        read.setdefault(where, []).append((offset, offset + len(view)))
        real(fd, view, offset, where)

    summed: list[int] = []
    monkeypatch.setattr(follower, "read_exact", noted)
    monkeypatch.setattr("distmerge.stream.crc32", lambda data: summed.append(len(data)) or zlib.crc32(data))
    out = merge(*long, tmp_path / "out", digest=kind)
    assert (sum(summed) > 0) == (kind != "none"), "without a digest no checksum is computed either"
    spans = {name: [0, *(end for _, end in found)] for name, found in read.items()}
    assert all([begin for begin, _ in read[name]] == ends[:-1] for name, ends in spans.items()), "in order, no gaps"
    sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert {name: ends[-1] for name, ends in spans.items()} == (sizes if kind in ("sha256", "xxh3") else {})


def test_a_file_is_hashed_while_it_is_written_and_durable_while_the_next_is(
    long: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds each segment back until everything before it is hashed, and whole files are renamed."""
    hashed: dict[str, int] = {}
    real_read, start = follower.read_exact, Stream.begin

    def noted(fd: int, view: memoryview, offset: int, where: str) -> None:
        real_read(fd, view, offset, where)
        hashed[where] = offset + len(view)

    def held(self: Stream, number: int, tick: Callable[[], None]) -> Running:
        plan = self._plan
        segment = plan.segments[number]
        piece = segment.pieces[0]
        task = plan.tasks[piece.task]
        begin = task.begin + task.block_begin(piece.first) if task.num_blocks else 0
        until(lambda: hashed.get(plan.files[segment.file].name, 0) >= begin)
        begun = [
            other for other in range(len(plan.files)) if other != segment.file and plan.files[other].name in hashed
        ]
        until(lambda: all((tmp_path / "out.distmerge" / "model" / plan.files[other].name).exists() for other in begun))
        return start(self, number, tick)

    monkeypatch.setattr(follower, "read_exact", noted)
    monkeypatch.setattr(Stream, "begin", held)
    monkeypatch.setattr(Stream, "follows", lambda *_: False)  # so that one is whole before the next begins
    out = merge(*long, tmp_path / "out")
    assert receipt(out)["files"].keys() >= hashed.keys() == digests(out).keys()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing follows what is written"
        time.sleep(0.002)


# -- several ranks, as threads of this process


def ranks_of(store: HashStore, count: int) -> list[World]:
    places = [Place(rank=rank, size=count, local_rank=rank, local_size=count) for rank in range(count)]
    return [World(place, store, timeout=60) for place in places]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_files_give_the_files_and_digests_of_one(
    kind: str, long: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = merge(*long, tmp_path / "alone", digest=kind)
    config = config_for(*long, tmp_path / "out", digest=kind)
    errors: list[BaseException] = []

    def rank(world: World) -> None:
        try:
            with WorkFolder(config.output) as work:
                merge_ranks(config, work, world, Display(quiet=True), time.time())
        except BaseException as error:
            errors.append(error)
            world.fail(error)
        finally:
            world.leave()

    threads = [threading.Thread(target=rank, args=(world,)) for world in ranks_of(HashStore(), 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert tree(config.output) == tree(alone)


class Ended(WorkFolder):
    """A work folder that only notes which files are ended."""

    def __init__(self) -> None:
        self.files: list[int] = []

    def finish(
        self, plan: Plan, number: int, follow: Callable[[int], tuple[str, tuple[int, ...]]], again: Any = None
    ) -> ShardRecord:
        digest, crcs = follow(-1)
        self.files.append(number)
        return ShardRecord(file=number, nbytes=plan.files[number].nbytes, digest=digest, segment_crc32s=crcs)

    def note(self, plan: Plan, **record: SegmentRecord | ShardRecord) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...


def test_a_file_is_ended_by_the_rank_of_its_first_segment_once_all_ranks_have_done_theirs() -> None:
    plan = plan_without_digests()
    last = plan.segments_of(0)[-1]
    here, there = Ended(), Ended()
    worlds = ranks_of(HashStore(), 2)
    with (
        closing(Followers(plan, here, worlds[0], {}, num_lanes=1)) as mine,
        closing(Followers(plan, there, worlds[1], {}, num_lanes=1)) as other,
    ):
        for number in plan.segments_of(0)[:-1]:
            mine.begin(number)
            mine.end(number, kept=False)
        other.begin(last)
        assert not mine.wait(0.1)
        assert here.files == []
        other.end(last, kept=False)
        assert mine.wait(60)
        assert other.wait(0)
    assert (here.files, there.files) == ([0], [])


def test_a_rank_that_leaves_does_not_wait_for_segments_of_others() -> None:
    plan, work = plan_without_digests(), Ended()
    followers = Followers(plan, work, ranks_of(HashStore(), 2)[0], {}, num_lanes=1)
    followers.begin(plan.segments_of(0)[0])
    followers.begin(plan.segments_of(1)[0])
    followers.close()
    assert work.files == []
    with pytest.raises(Interrupted):
        followers.check()


def test_a_silent_rank_is_named_by_those_that_wait_for_its_segments() -> None:
    store = HashStore()
    store.set("host/1", '1\n{"host": "far", "pid": 5}')
    world = World(Place(rank=0, size=2, local_rank=0, local_size=2), store, timeout=0.05)
    with pytest.raises(MachineError, match=r"no sign of life for 0\.05 s") as caught:
        until(lambda: bool(world.watch("the segments of other ranks")))
    assert caught.value.where == "rank 1 on far"


def plan_without_digests() -> Plan:
    shards = {"a": [wanted("long", (60_000, 1000), r=2)], "b": [wanted("next", (40_000, 1000), r=4)]}
    plan = replace(cast(Plan, plan_of(shards)), file_digest="none")
    assert len(plan.segments_of(0)) > 2
    return plan


# -- resuming


def halfway(long: tuple[Path, Path], output: Path, kind: str, count: int) -> tuple[Plan, WorkFolder]:
    """A merge that stopped after its first `count` segments; files of which all are there are ended."""
    base, adapter = long
    plan, work = make_plan(config_for(base, adapter, output, digest=kind), "cpu"), WorkFolder(output)
    work.open(plan)
    world = World(Place(rank=0, size=1, local_rank=0, local_size=1), HashStore(), timeout=60)
    followers = Followers(plan, work, world, {}, num_lanes=1)
    with stream_of(plan, base, adapter, work) as stream:
        for number in range(count):
            followers.begin(number)
            work.note(plan, segment=stream.run(number, lambda: None))
            followers.end(number, kept=False)
    until(lambda: len(list(work.model.glob("*.safetensors"))) == (count >= len(plan.segments_of(0))))
    until(lambda: len(work.done(plan).shards) == len(list(work.model.glob("*.safetensors"))))
    followers.close()
    work.release()
    return plan, work


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_resumed_merge_keeps_what_can_be_proven_and_gives_equal_bytes(
    kind: str, more: int, long: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = merge(*long, tmp_path / "alone", digest=kind)
    first = len(make_plan(config_for(*long, tmp_path / "out", digest=kind), "cpu").segments_of(0))
    plan, _ = halfway(long, tmp_path / "out", kind, first + more)
    capfd.readouterr()
    merge(*long, tmp_path / "out", digest=kind)
    assert tree(tmp_path / "out") == tree(alone)
    kept = first + more if kind != "none" else first * (more >= 0)
    said = capfd.readouterr().err
    assert (f"resumed  {kept} of {len(plan.segments)} segments" in said) == (kept > 0), said


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_whose_bytes_changed_is_done_again_where_a_checksum_tells(
    kind: str, long: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = merge(*long, tmp_path / "alone", digest=kind)
    plan, work = halfway(long, tmp_path / "out", kind, 1)
    path = work.model / f"{plan.files[0].name}.part"
    with path.open("r+b") as file:
        file.seek(plan.files[0].data_begin + 77)
        file.write(b"\xff\xff")
    merge(*long, tmp_path / "out", digest=kind)
    assert tree(tmp_path / "out") == tree(alone)


@pytest.mark.parametrize("harm", ["gone", "shorter", "longer", "begun anew"])
def test_a_whole_file_without_digest_of_which_only_the_name_is_left_is_written_again(
    harm: str, long: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = merge(*long, tmp_path / "alone", digest="none")
    first = len(make_plan(config_for(*long, tmp_path / "out"), "cpu").segments_of(0))
    plan, work = halfway(long, tmp_path / "out", "none", first)
    path = work.model / plan.files[0].name
    nbytes = path.stat().st_size
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * (nbytes + {"shorter": -1, "longer": 1, "begun anew": 0}[harm]))
    if harm == "begun anew":
        path.with_name(f"{path.name}.part").write_bytes(b"")
    merge(*long, tmp_path / "out", digest="none")
    assert tree(tmp_path / "out") == tree(alone)


def test_a_file_that_was_read_back_wrongly_once_is_read_again_by_the_next_run(
    long: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, real = merge(*long, tmp_path / "alone"), follower.read_exact

    def failing(fd: int, view: memoryview, offset: int, where: str) -> None:
        real(fd, view, offset, where)
        view[-1] ^= 1

    with monkeypatch.context() as broken:
        broken.setattr(follower, "read_exact", failing)
        with pytest.raises(VerifyError, match="read back with other bytes"):
            merge(*long, tmp_path / "out")
    merge(*long, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(alone)


def test_a_file_that_grew_while_it_was_written_does_not_get_its_name(
    long: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, note = merge(*long, tmp_path / "alone", digest="none"), WorkFolder.note

    def grown(self: WorkFolder, plan: Plan, **record: SegmentRecord | ShardRecord) -> None:
        for path in self.model.glob("*.part"):
            with path.open("ab") as file:
                file.write(b"more")
        note(self, plan, **record)

    with monkeypatch.context() as broken:
        broken.setattr(WorkFolder, "note", grown)
        with pytest.raises(VerifyError, match="planned were"):
            merge(*long, tmp_path / "out", digest="none")
    assert list((tmp_path / "out.distmerge" / "model").glob("*.safetensors")) == []
    merge(*long, tmp_path / "out", digest="none")
    assert tree(tmp_path / "out") == tree(alone)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_merge_is_not_resumed_with_another_digest(kind: str, long: tuple[Path, Path], tmp_path: Path) -> None:
    halfway(long, tmp_path / "out", "sha256", 1)
    with pytest.raises(InputError, match=rf"--digest \(sha256 -> {kind}\)"):
        merge(*long, tmp_path / "out", digest=kind)
