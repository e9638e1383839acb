"""Memory that runs out in the middle: fewer lanes go on, with the same blocks and the same bytes, or the run ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distmerge import stream
from distmerge.clock import Clock
from distmerge.errors import MachineError
from distmerge.lanes import Lane, Lanes
from tests.conftest import tree
from tests.factories import merge

ERRORS = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
    "host": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"),
    "Python": MemoryError,
}


class Memory:
    """Lets every block of a merge on three lanes run out of memory while more than `room` lanes are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, room: int, error: Callable[[], Exception]) -> None:
        self.lanes: list[Lane] = []
        write: Any = stream.write_values
        made = Lanes.__init__

        def noted(this: Lanes, *args: Any) -> None:
            made(this, *args)
            self.lanes = this._lanes

        def scarce(lane: Lane, *args: Any) -> Any:
            if len(self.lanes) > room:
                raise error()
            return write(lane, *args)

        monkeypatch.setattr(stream, "write_values", scarce)
        monkeypatch.setattr("distmerge.share.wanted_lanes", lambda _: 3)
        monkeypatch.setattr(Lanes, "__init__", noted)


@pytest.mark.parametrize(
    ("error", "room"), [("accelerator", 1), ("accelerator", 2), ("driver", 2), ("host", 1), ("Python", 2)]
)
def test_where_memory_runs_out_fewer_lanes_write_the_same_bytes(
    error: str,
    room: int,
    *,
    base: Path,
    adapter: Path,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory(monkeypatch, room=room, error=ERRORS[error])
    assert tree(merge(base, adapter, tmp_path / "out")) == tree(merged)
    assert len(memory.lanes) == room, "no more lanes than needed have left"


def test_where_not_even_one_lane_has_memory_the_merge_ends_in_words_and_can_be_resumed(
    base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as inside:
        Memory(inside, room=0, error=ERRORS["accelerator"])
        with pytest.raises(MachineError, match="out of memory") as caught:
            merge(base, adapter, tmp_path / "out")
        assert "--memory-budget" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert tree(merge(base, adapter, tmp_path / "out")) == tree(merged)


def test_where_there_is_memory_for_some_lanes_only_these_are_taken(
    base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, made, error = Memory(monkeypatch, room=3, error=ERRORS["host"]), Lane.__init__, ERRORS["accelerator"]
    count = 0

    def scarce(lane: Lane, *args: Any) -> None:
        nonlocal count
        count += 1
        if count > room:
            raise error()
        made(lane, *args)

    monkeypatch.setattr(Lane, "__init__", scarce)
    room = 2
    assert tree(merge(base, adapter, tmp_path / "out")) == tree(merged)
    assert len(memory.lanes) == 2
    count, room = 0, 0
    with pytest.raises(MachineError, match="out of memory"):
        merge(base, adapter, tmp_path / "none")


def test_blocks_that_all_lanes_give_up_at_once_are_done_by_the_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmerge.lanes.Lane", lambda *_: SimpleNamespace(clock=Clock(), settle=lambda: None))
    reader: Any = SimpleNamespace(buffers=lambda: None)
    plan: Any = None
    lanes = Lanes(plan, reader, torch.device("cpu"), 2)
    together, failed = threading.Barrier(2, timeout=30), set[int]()

    def work(_: Lane, block: int) -> int:
        if block < 2 and block not in failed:
            failed.add(block)
            together.wait()
            raise torch.OutOfMemoryError("both")
        return block

    deadline = time.monotonic() + 20

    def tick() -> None:
        assert time.monotonic() < deadline, "nobody takes what was given up"

    batch = lanes.begin(iter(range(5)), work)
    batch.handed_out(tick)
    assert sorted(batch.finish(tick)) == [0, 1, 2, 3, 4]
    assert len(lanes._lanes) == 1
    lanes.close()
