"""Digests of inputs: every file of base and adapters once, held against the Hub's, and against the inputs later."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub._local_folder import write_download_metadata
from torch._C._distributed_c10d import HashStore

import distmerge
from distmerge import AdapterChoice, MergeConfig, input_files
from distmerge.cli.checking import render_audit
from distmerge.errors import InputError, MachineError, VerifyError
from distmerge.input_files import InputHashes, InputRecord
from distmerge.plan import make_plan
from distmerge.storage.hub import hub_sha256
from distmerge.verify import check_inputs
from distmerge.work import WorkFolder
from distmerge.world import Place, World
from tests.conftest import tree
from tests.factories import hub_snapshot, merge


def config_for(base: Path, adapter: Path, output: Path, **options: Any) -> MergeConfig:
    options = {"hash_inputs": True, **options}
    return MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output, device="cpu", **options)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def receipt(output: Path) -> dict[str, Any]:
    return json.loads((output / "merge_receipt.json").read_text())


def hashable(base: Path, adapter: Path) -> dict[str, Path]:
    """The files that say what a merge is made from, by the names that the receipt has for them."""
    found = {f"base/{path.name}": path for path in base.glob("model*.safetensors*")} | {
        "base/config.json": base / "config.json"
    }
    return found | {
        f"adapter 1/{name}": adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")
    }


@pytest.fixture(scope="module")
def hashed(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with the digests of its inputs."""
    return merge(base, adapter, tmp_path_factory.mktemp("hashed") / "out", hash_inputs=True)


# -- what is told


def test_the_receipt_has_the_sha256_of_every_file_of_base_and_adapters(
    base: Path, adapter: Path, *, merged: Path, hashed: Path
) -> None:
    expected = {
        name: {"sha256": sha256(path), "bytes": path.stat().st_size, "on_hub": False}
        for name, path in hashable(base, adapter).items()
    }
    assert receipt(hashed)["inputs"] == expected
    assert receipt(merged)["inputs"] == {}
    mine, others = ({n: d for n, d in tree(out).items() if n != "merge_receipt.json"} for out in (hashed, merged))
    assert mine == others, "nothing else changes"


def test_each_input_is_hashed_by_one_rank_of_all(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(base, adapter, tmp_path / "out")
    plan, store = make_plan(config, "cpu"), HashStore()
    met, together = set[int](), threading.Barrier(3, timeout=60)

    def meeting(_: Path) -> None:
        """So that no rank is first everywhere, each waits at its first file for the others."""
        if (rank := threading.get_ident()) not in met:
            met.add(rank)
            together.wait()

    monkeypatch.setattr(input_files, "hub_sha256", meeting)
    places = [Place(rank=rank, size=3, local_rank=rank, local_size=3) for rank in range(3)]
    hashes = [InputHashes(plan, config, World(place, store, timeout=60)) for place in places]
    try:
        assert all(one.wait(60) for one in hashes)
        found = [record for one in hashes for record in one.records()]
    finally:
        for one in hashes:
            one.close()
    expected = hashable(base, adapter)
    assert {record.name: record.sha256 for record in found} == {name: sha256(path) for name, path in expected.items()}
    assert all(one.records() for one in hashes)
    check_inputs(expected, found)
    for records in (found[1:], [*found, found[0]], [*found, InputRecord(name="x", sha256="", nbytes=1, on_hub=False)]):
        with pytest.raises(VerifyError, match="1 inputs were not hashed exactly once"):
            check_inputs(expected, records)


def test_without_the_option_no_input_is_hashed(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = config_for(base, adapter, tmp_path / "out", hash_inputs=False)
    world = World(Place(rank=0, size=1, local_rank=0, local_size=1), HashStore(), timeout=60)
    before = threading.active_count()
    hashes = InputHashes(make_plan(config, "cpu"), config, world)
    assert (hashes.wait(0), hashes.records(), threading.active_count()) == (True, (), before)
    hashes.close()


def test_the_buffer_is_counted_and_the_option_belongs_to_the_plan(base: Path, adapter: Path, tmp_path: Path) -> None:
    with_it, without = (
        make_plan(config_for(base, adapter, tmp_path / "out", hash_inputs=flag), "cpu") for flag in (True, False)
    )
    assert with_it.least_nbytes - without.least_nbytes == 1 << 20
    assert "--hash-inputs" in config_for(base, adapter, tmp_path / "out").to_argv()
    WorkFolder(tmp_path / "out").open(without)
    with pytest.raises(InputError, match=r"--hash-inputs \(False -> True\)"):
        merge(base, adapter, tmp_path / "out", hash_inputs=True)


# -- what the Hub knows


def cached(folder: Path, cache: Path) -> Path:
    """`folder` as the Hub's cache holds it: large files in blobs that are named by their SHA-256."""
    snapshot = hub_snapshot(folder, cache)
    for path in snapshot.iterdir():
        blob = path.resolve()
        etag = sha256(blob) if path.suffix == ".safetensors" else hashlib.sha1(blob.read_bytes()).hexdigest()
        path.unlink()
        blob.rename(blob.with_name(etag))
        path.symlink_to(Path("../../blobs") / etag)
    return snapshot


def downloaded(folder: Path, target: Path) -> Path:
    """`folder` as a download into a folder of one's own leaves it."""
    shutil.copytree(folder, target)
    for path in folder.iterdir():
        etag = sha256(path) if path.suffix == ".safetensors" else hashlib.sha1(path.read_bytes()).hexdigest()
        write_download_metadata(target, path.name, "c0ffee" * 6 + "abcd", etag)
    return target


@pytest.mark.parametrize("kept", [cached, downloaded])
def test_files_that_the_hub_has_are_told_and_one_that_it_has_otherwise_is_refused_by_name(
    kept: Any, base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = kept(base, tmp_path / "hub")
    inputs = receipt(merge(folder, adapter, tmp_path / "out", hash_inputs=True))["inputs"]
    weights = {f"base/{path.name}" for path in base.glob("*.safetensors")}
    assert {name for name, entry in inputs.items() if entry["on_hub"]} == weights
    assert f"inputs   {len(inputs)} files hashed, {len(weights)} of them as the Hub has them" in capfd.readouterr().err
    damaged = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.resolve().write_bytes(content)
    merge(folder, adapter, tmp_path / "unseen")
    with pytest.raises(InputError, match=f"that of the file on the Hub is {hub_sha256(damaged)}") as caught:
        merge(folder, adapter, tmp_path / "other", hash_inputs=True)
    assert caught.value.where == str(damaged)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "metadata",
    [b"", b"c\n", b"c\nabc\n1\n", b"\xff\xfe\n\xff\n", b"c\n" + b"g" * 64, b"x" * 5000, b'c\n"%b"\n' % (b"A" * 64)],
)
def test_what_is_no_digest_of_a_download_is_none(metadata: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "model.safetensors"
    kept = tmp_path / ".cache/huggingface/download/sub/model.safetensors.metadata"
    for each in (path, kept):
        each.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert hub_sha256(path) is None
    kept.write_bytes(metadata)
    assert hub_sha256(path) is None
    kept.write_text(f'c\n"{"a" * 64}"\n1.5\n')
    assert hub_sha256(path) == "a" * 64, "a folder of the repository finds what lies beside the whole"
    stranger = tmp_path / "blobs" / ("b" * 64)
    stranger.parent.mkdir()
    stranger.write_bytes(b"x")
    assert hub_sha256(stranger) is None, "a folder of this name is no cache of the Hub yet"


# -- verify


@pytest.fixture
def inputs(base: Path, adapter: Path, tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(base, tmp_path / "b")), Path(shutil.copytree(adapter, tmp_path / "a"))


def verify(output: Path, inputs: tuple[Path, Path]) -> distmerge.audit.findings.Audit:  # type: ignore[name-defined]
    choices = (AdapterChoice(folder=inputs[1]),)
    return distmerge.verify(output, base=inputs[0], adapters=choices, depth="sample", sample_share=0)


def test_verify_holds_the_inputs_against_the_receipt(hashed: Path, merged: Path, inputs: tuple[Path, Path]) -> None:
    found = verify(hashed, inputs)
    assert found.num_inputs == len(receipt(hashed)["inputs"])
    assert f"compared {found.num_inputs} files of base and adapters by sha256: all as they" in render_audit(found)
    assert distmerge.verify(hashed).num_inputs == verify(merged, inputs).num_inputs == 0
    weights = sorted(inputs[0].glob("*.safetensors"))[0]
    for path in (weights, inputs[0] / "config.json", inputs[1] / "adapter_config.json"):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]) if path == weights else before + b"\n")
        with pytest.raises(InputError, match="is not the file that was merged: sha256 is") as caught:
            verify(hashed, inputs)
        assert caught.value.where == str(path)
        path.write_bytes(before)
    (inputs[0] / "config.json").unlink()
    with pytest.raises(InputError, match=r"not those of the receipt: 'base/config\.json'"):
        verify(hashed, inputs)


def test_an_input_that_cannot_be_read_ends_the_run_in_words(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise MachineError("Input/output error (EIO)", where="disk")

    monkeypatch.setattr(input_files, "read_exact", failing)
    with pytest.raises(MachineError, match="EIO"):
        merge(base, adapter, tmp_path / "out", hash_inputs=True)
    assert not (tmp_path / "out").exists()
