"""A pickle of weights is read only when asked for, runs nothing, and takes no more than it may."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distmerge.adapter.saved.pickles import unpickle
from distmerge.adapter.saved.training import read_saved
from distmerge.errors import InputError

KEY = "base_model.model.q_proj.lora_A.default.weight"
CONFIG = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tied = torch.randn(3, 5)
    return {
        "tied": tied,
        "again": tied,
        "columns": torch.randn(4, 6).T,
        "rows": torch.randn(9, 4)[2:5],
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor(2),
        "flag": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


class Call:
    """Pickles into a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def with_member(path: Path, name: str, data: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """An archive of torch.save whose member `name` holds `data`."""
    torch.save({KEY: torch.ones(2, 3)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, old in members.items():
            archive.writestr(member, data if member.endswith(name) else old)


@pytest.mark.parametrize("archive", [True, False])
def test_the_tensors_of_a_pickle_are_rewritten_as_they_are(archive: bool, tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a.bin", _use_new_zipfile_serialization=archive)
    assert unpickle(tmp_path / "a.bin", tmp_path / "b.safetensors") == []
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], value.detach()) for name, value in weights().items())
    assert all(found[name].dtype == value.dtype for name, value in weights().items())


def test_a_trainers_file_gives_its_weights_and_says_what_else_it_holds(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(), "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "a.ckpt")
    assert unpickle(tmp_path / "a.ckpt", tmp_path / "b.safetensors") == ["epoch", "optimizer"]
    assert load_file(tmp_path / "b.safetensors").keys() == weights().keys()


def test_a_pickle_is_not_read_unless_it_is_allowed(tmp_path: Path) -> None:
    torch.save({KEY: torch.ones(2, 3)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        read(tmp_path, allow_pickle=False)


def read(folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {"base_modules": (), "base_config": {}, "lora_alpha": 4.0, "use_rslora": None}
    return read_saved(folder, **{**options, "allow_pickle": True, **changes})


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "pytorch_model_fsdp.bin", "mine.pt"])
def test_a_pickle_says_the_same_adapter_and_the_inputs_stay_as_they_are(name: str, tmp_path: Path) -> None:
    state = {KEY: torch.randn(2, 3), KEY.replace("lora_A", "lora_B"): torch.randn(4, 2)}
    pickled, safe, scratch = tmp_path / "pickled", tmp_path / "safe", tmp_path / "scratch"
    for folder in (pickled, safe, scratch):
        folder.mkdir()
    torch.save(state, pickled / name)
    save_file(state, safe / "model.safetensors")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pickled.iterdir()}
    found, wanted = read(pickled, scratch=scratch), read(safe)
    assert found.tensors.keys() == wanted.tensors.keys()
    assert found.config == wanted.config
    assert list(found.pickles.values()) == [name]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pickled.iterdir()} == before
    assert list(map(Path, found.files)) == list(scratch.iterdir())


def test_the_pickled_shards_of_an_index_are_read_as_one(tmp_path: Path) -> None:
    other = KEY.replace("lora_A", "lora_B")
    torch.save({KEY: torch.ones(2, 3)}, tmp_path / "pytorch_model-1.bin")
    torch.save({other: torch.ones(4, 2)}, tmp_path / "pytorch_model-2.bin")
    weight_map = {KEY: "pytorch_model-1.bin", other: "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert {view.spec.name for view in read(tmp_path).tensors.values()} == {KEY, other}


def test_a_converted_file_is_used_again_until_its_pickle_changes(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    torch.save({KEY: torch.ones(2, 3)}, tmp_path / "a.pt")
    first = read(tmp_path, scratch=scratch).files
    stamp = Path(first[0]).stat().st_mtime_ns
    assert read(tmp_path, scratch=scratch).files == first
    assert Path(first[0]).stat().st_mtime_ns == stamp
    torch.save({KEY: torch.ones(2, 7)}, tmp_path / "a.pt")
    again = read(tmp_path, scratch=scratch)
    assert [view.size for view in again.tensors.values()] == [(2, 7)]


def test_trained_weights_beside_an_adapter_are_read_with_it_or_refused(tmp_path: Path) -> None:
    save_file({KEY.replace(".default", ""): torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    torch.save({"base_model.model.projector.weight": torch.ones(3)}, tmp_path / "non_lora_trainables.bin")
    (tmp_path / "adapter_config.json").write_text(CONFIG)
    with pytest.raises(InputError, match="would be lost"):
        read(tmp_path, allow_pickle=False)
    assert "base_model.model.projector.weight" in read(tmp_path).tensors


CALLS: dict[str, Callable[[Path], object]] = {
    "a shell command": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "a file": lambda mark: Call(open, str(mark), "w"),
    "a file removed": lambda mark: Call(shutil.rmtree, str(mark.parent)),
    "torch's own loader": lambda mark: Call(torch.load, str(mark)),
    "a class of ours": lambda mark: Call(Path, str(mark)),
}


@pytest.mark.parametrize(("what", "archive"), [*((what, True) for what in CALLS), ("a shell command", False)])
def test_nothing_that_a_pickle_names_is_called(what: str, archive: bool, tmp_path: Path) -> None:
    mark = tmp_path / "called"
    hostile = {KEY: torch.ones(2, 3), "x": CALLS[what](mark)}
    torch.save(hostile, tmp_path / "a.bin", _use_new_zipfile_serialization=archive)
    with pytest.raises(InputError, match="which weights do not need"):
        unpickle(tmp_path / "a.bin", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


PROTO = b"\x80\x02"
BOMBS: dict[str, Callable[[Path], object]] = {
    "a plain pickle of a call": lambda path: path.write_bytes(pickle.dumps(Call(os.system, "touch called"))),
    "a stream that ends early": lambda path: with_member(path, "data.pkl", PROTO + b"X\xff\xff\xff\x7f."),
    "lists in lists": lambda path: with_member(path, "data.pkl", PROTO + b"]" * 200_000 + b"a" * 199_999 + b"."),
    "a compressed archive": lambda path: with_member(
        path, "data.pkl", PROTO + bytes(50_000_000), compression=zipfile.ZIP_DEFLATED
    ),
    "an archive of several disks": lambda path: path.write_bytes(
        b"PK\x06\x07" + bytes(12) + b"\x09\0\0\0" + b"PK\x05\x06" + bytes(18)
    ),
    "more elements than bytes": lambda path: torch.save({KEY: torch.zeros(1).expand(1 << 40)}, path),
    "a sparse tensor": lambda path: torch.save({KEY: torch.eye(3).to_sparse()}, path),
    "a tensor without a device": lambda path: torch.save({KEY: torch.empty(2, device="meta")}, path),
    "a name that is no text": lambda path: torch.save({3: torch.ones(2)}, path),
    "a number among tensors": lambda path: torch.save({KEY: torch.ones(2), "step": 5}, path),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "nothing": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "half a file": lambda path: (torch.save({KEY: torch.ones(999)}, path), os.truncate(path, 2000)),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_file_that_is_no_plain_weights_is_refused_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    BOMBS[what](tmp_path / "a.bin")
    with pytest.raises(InputError) as refused:
        unpickle(tmp_path / "a.bin", tmp_path / "b.safetensors", memory_nbytes=32 << 20, seconds=60)
    assert str(tmp_path / "a.bin") in str(refused.value)
    assert not re.search(r"Traceback|weights_only|\x1b", str(refused.value))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_reading_ends_when_its_time_is_up(tmp_path: Path) -> None:
    with_member(tmp_path / "a.bin", "data.pkl", PROTO + b"]q\x00" * 20_000_000 + b".")
    with pytest.raises(InputError, match="more than 1 s"):
        unpickle(tmp_path / "a.bin", tmp_path / "b.safetensors", seconds=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_reading_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(list(range(3_000_000)), protocol=2))
    with pytest.raises(InputError, match=r"MemoryError|more than"):
        unpickle(tmp_path / "a.bin", tmp_path / "b.safetensors", memory_nbytes=32 << 20)


def test_tensors_take_no_more_room_than_their_file(tmp_path: Path) -> None:
    torch.save({KEY: torch.zeros(1).expand(9000)}, tmp_path / "a.bin")
    with pytest.raises(InputError, match="36000 bytes in a file of"):
        unpickle(tmp_path / "a.bin", tmp_path / "b.safetensors")


def test_the_environment_and_the_working_folder_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("open('imported', 'w'); raise SystemExit(3)")
    torch.save({KEY: torch.ones(2, 3)}, tmp_path / "a.bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    unpickle(tmp_path / "a.bin", tmp_path / "b.safetensors")
    assert not (tmp_path / "imported").exists()
