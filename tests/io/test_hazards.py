"""Values at the edge of what floats hold, files that change under a merge, and a machine that allows little."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distmerge
from distmerge import AdapterChoice, MergeConfig, reader, stream
from distmerge.errors import MachineError, VerifyError
from distmerge.journal import ShardRecord
from distmerge.plan import Plan
from distmerge.reader import Reader
from distmerge.stream import SegmentRecord
from distmerge.work import WorkFolder
from tests.conftest import environment
from tests.factories import load_folder, merge, split_files, write_adapter, write_base

Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm.weight"


def _inputs(folder: Path, dtype: torch.dtype = torch.bfloat16, *, size: float = 1.0, **more: Tensor) -> list[Path]:
    """A base with one linear and `more`, and an adapter of factors as large as `size`."""
    base = write_base(folder / "base", {f"{Q}.weight": torch.ones(8, 8, dtype=dtype), **more})
    factors = (torch.full((2, 8), size), torch.full((8, 2), size))
    return [base, write_adapter(folder / "lora", {Q: factors})]


def test_every_nan_of_an_untouched_tensor_is_verified_after_a_cast(tmp_path: Path) -> None:
    codes = torch.tensor([0x7FC0, 0x7FC1, 0x7F81, 0x7FFF, -0x0040, -0x007F, 0x3F80, 0x7F80], dtype=torch.int16)
    base, lora = _inputs(tmp_path, **{NORM: codes.view(torch.bfloat16).repeat(40)})
    out = merge(base, lora, tmp_path / "out", dtype="float32")
    assert int(load_folder(out)[NORM].isnan().sum()) == 6 * 40
    assert distmerge.verify(out, base=base, adapters=(AdapterChoice(folder=lora),)).recomputed is not None


@pytest.mark.parametrize("beside", [-torch.inf, torch.nan, 1.0], ids=str)
def test_a_cast_that_makes_an_infinity_is_refused_beside_whatever_value(tmp_path: Path, beside: float) -> None:
    base, lora = _inputs(tmp_path, **{NORM: torch.tensor([1e30, beside], dtype=torch.bfloat16)})
    with pytest.raises(VerifyError, match=NORM):
        merge(base, lora, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_infinity_that_the_base_holds_survives_a_cast(tmp_path: Path) -> None:
    base, lora = _inputs(tmp_path, **{NORM: torch.tensor([2.0, -torch.inf], dtype=torch.bfloat16)})
    out = merge(base, lora, tmp_path / "out", dtype="float16")
    assert load_folder(out)[NORM].tolist() == [2.0, -torch.inf]


@pytest.mark.parametrize("size", [1e9, 1e15, 4e18])
def test_the_receipt_of_a_huge_change_holds_only_finite_numbers(tmp_path: Path, size: float) -> None:
    base, lora = _inputs(tmp_path, torch.float32, size=size)
    out = merge(base, lora, tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(f"the receipt holds {constant}")

    ledger = json.loads((out / "merge_receipt.json").read_text(), parse_constant=refuse)["ledger"]
    norm = 6 / 2 * 2 * size**2 * 8
    assert all(entry["delta_norm"] == pytest.approx(norm, rel=1e-6) for entry in ledger.values())
    assert all(entry["applied_norm"] == pytest.approx(norm, rel=1e-6) for entry in ledger.values())
    distmerge.verify(out, base=base, adapters=(AdapterChoice(folder=lora),))


def test_a_base_of_more_shards_than_files_may_be_open_is_merged(tmp_path: Path) -> None:
    base, lora = _inputs(tmp_path, **{f"model.extra.{number}": torch.ones(3) for number in range(149)})
    split_files(base, {name: f"model-{number:05}.safetensors" for number, name in enumerate(sorted(load_folder(base)))})
    args = ["--base", base, "--adapter", lora, "--output", tmp_path / "out", "--nproc", 1, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "distmerge", "merge", *map(str, args)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        env=environment(),
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 150


@pytest.mark.parametrize("place", [0, 77, -1], ids=["first byte", "a later byte", "last byte"])
def test_a_byte_that_changes_between_writing_and_reading_back_is_found(
    place: int, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = WorkFolder.note

    def flip(self: WorkFolder, plan: Plan, **record: SegmentRecord | ShardRecord) -> None:
        segment = record.get("segment")
        if isinstance(segment, SegmentRecord) and plan.segments_of(1)[-1] == segment.segment:
            with (self.model / f"{plan.files[1].name}.part").open("r+b") as file:
                file.seek(place, os.SEEK_END) if place < 0 else file.seek(plan.files[1].data_begin + place)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
        note(self, plan, **record)

    monkeypatch.setattr(WorkFolder, "note", flip)
    with pytest.raises(VerifyError, match="read back with other bytes"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_file_of_the_same_length_and_another_header_is_not_read(tmp_path: Path) -> None:
    base, lora = _inputs(tmp_path, **{NORM: torch.ones(8)})
    config = MergeConfig(base=base, adapters=(AdapterChoice(folder=lora),), output=tmp_path / "out", device="cpu")
    plan = distmerge.plan(config)
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"model.norm", b"model.mron"))
    reader = Reader(plan, base, (lora,), torch.device("cpu"))
    with pytest.raises(MachineError, match="not the file that the merge was planned with") as caught:
        reader.read(plan.tasks[0].source.data, 0, memoryview(bytearray(2)))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("grew", [False, True], ids=["when asked", "a moment later"])
def test_files_are_closed_only_while_no_lane_reads(grew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base of very many files, some that lanes still read when the next segment begins; a number that is closed
    may be another file's an instant later."""
    weights = {f"model.layers.{number}.self_attn.q_proj": torch.ones(1024, 1024) for number in range(10)}
    base = write_base(tmp_path / "base", {f"{name}.weight": weight for name, weight in weights.items()})
    lora = write_adapter(tmp_path / "lora", {name: (torch.ones(1, 1024), torch.ones(1024, 1)) for name in weights})
    busy, write, close = set[int](), stream.write_values, Reader.close
    closed = 0

    def slow(*args: Any) -> Any:
        busy.add(threading.get_ident())
        time.sleep(0.005)
        try:
            return write(*args)
        finally:
            busy.remove(threading.get_ident())

    def noted(self: Reader) -> None:
        nonlocal closed
        assert not busy
        closed += 1
        close(self)

    monkeypatch.setattr(reader, "_MAX_OPEN", 0)
    monkeypatch.setattr(stream, "write_values", slow)
    monkeypatch.setattr(Reader, "close", noted)
    monkeypatch.setattr("distmerge.share.wanted_lanes", lambda _: 2)
    if grew:
        monkeypatch.setattr(stream.Stream, "follows", lambda *_: True)
    assert len(load_folder(merge(base, lora, tmp_path / "out", digest="none"))) == 10
    assert closed == (1 if grew else 3), "before each segment that none is running at, and at the end"
