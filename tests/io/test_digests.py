"""What is computed of weight files: the choice changes no weight, costs what it says, and is told as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import xxhash

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.cli.checking import render_audit
from distmerge.errors import InputError, UsageError, VerifyError
from distmerge.inspection import inspect
from distmerge.plan import make_plan
from distmerge.report.folder import write_report
from tests.conftest import tree
from tests.factories import edit_json, merge

KINDS = ("sha256", "crc32", "xxh3", "none")
OF = {
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "crc32": lambda data: f"{zlib.crc32(data):08x}",
    "xxh3": xxhash.xxh3_64_hexdigest,
}


@pytest.fixture(scope="module")
def outputs(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One merge with each kind of digest. Read only."""
    folder = tmp_path_factory.mktemp("digests")
    return {kind: merge(base, adapter, folder / kind, digest=kind) for kind in KINDS}


def receipt(output: Path) -> dict[str, Any]:
    return json.loads((output / "merge_receipt.json").read_text())


def config_for(base: Path, adapter: Path, output: Path, **options: Any) -> MergeConfig:
    return MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output, device="cpu", **options)


# -- what is told


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_of_digest_changes_no_weight_and_no_side_file(kind: str, outputs: dict[str, Path]) -> None:
    told = ("README.md", "merge_receipt.json")
    mine, others = ({n: d for n, d in tree(outputs[k]).items() if n not in told} for k in (kind, "sha256"))
    assert mine == others


@pytest.mark.parametrize("kind", KINDS)
def test_the_receipt_has_the_chosen_digest_of_weights_and_the_sha256_of_all_else(
    kind: str, outputs: dict[str, Path]
) -> None:
    found = receipt(outputs[kind])
    assert found["options"]["digest"] == kind
    for name, entry in found["files"].items():
        data = (outputs[kind] / name).read_bytes()
        mine = kind if name.endswith(".safetensors") else "sha256"
        assert entry == {**({} if mine == "none" else {mine: OF[mine](data)}), "bytes": len(data)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_says_how_many_files_it_hashed(
    kind: str, base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = receipt(merge(base, adapter, tmp_path / "out", digest=kind))["files"]
    num_weights = sum(name.endswith(".safetensors") for name in files)
    rest = {"crc32": f", {num_weights} with a CRC-32 alone", "none": f", {num_weights} without a digest"}.get(kind, "")
    num_hashed = len(files) - num_weights * bool(rest)
    assert f"tensors written, {num_hashed} files hashed{rest}\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "card", "page"),
    [
        ("sha256", "every file's SHA-256", "files hashed, "),
        ("crc32", "the CRC-32 of every weight file", "with a CRC-32 alone"),
        ("xxh3", "the XXH3 of every weight file", "files hashed, "),
        ("none", "the length of every weight file", "without a digest"),
    ],
)
def test_card_report_and_inspect_tell_what_was_computed(
    kind: str, card: str, page: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    assert card in (outputs[kind] / "README.md").read_text()
    assert page in write_report(outputs[kind], tmp_path / "report").page.read_text()
    assert inspect(outputs[kind])["digest"] == kind


# -- verify


def flip_last_byte(out: Path) -> str:
    path = max(out.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path.name


@pytest.mark.parametrize("kind", KINDS)
def test_verify_holds_files_against_what_the_receipt_has_and_says_what_that_is(
    kind: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(outputs[kind], tmp_path / "out"))
    found = distmerge.verify(out)
    num_weights = len(list(out.glob("*.safetensors")))
    num_others = found.num_files - num_weights
    by_sha = num_others + num_weights * (kind == "sha256")
    assert found.digests == {"sha256": by_sha} | ({kind: num_weights} if kind != "sha256" else {})
    said = render_audit(found)
    words = {"none": "length alone"}.get(kind, kind)
    assert f"{found.digests[kind]} files by {words}" in said
    assert ("not looked at: the values of the weights" in said) == (kind == "none")
    name = flip_last_byte(out)
    if kind == "none":
        assert distmerge.verify(out) == found, "without a digest a flipped bit cannot be seen"
    else:
        with pytest.raises(VerifyError, match=f"{kind} is") as caught:
            distmerge.verify(out)
        assert caught.value.where.endswith(name)


def test_without_digests_verify_sees_lengths_and_with_the_base_every_value(
    base: Path, adapter: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    choices = (AdapterChoice(folder=adapter),)
    out = Path(shutil.copytree(outputs["none"], tmp_path / "out"))
    assert "not looked at" not in render_audit(distmerge.verify(out, base=base, adapters=choices))
    flip_last_byte(out)
    with pytest.raises(VerifyError):
        distmerge.verify(out, base=base, adapters=choices)
    path = max(out.glob("*.safetensors"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(VerifyError, match="bytes, the receipt says"):
        distmerge.verify(out)


def test_receipts_of_the_versions_before_are_read(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(outputs["sha256"], tmp_path / "out"))
    found, path = receipt(out), out / "merge_receipt.json"
    del found["inputs"], found["options"]["hash_inputs"]
    third = {**found, "version": 3}
    second = {**found, "version": 2, "options": {k: v for k, v in found["options"].items() if k != "digest"}}
    for older in (third, second):
        path.write_text(json.dumps(older))
        assert distmerge.verify(out) == distmerge.verify(outputs["sha256"])
        path.write_text(json.dumps({**older, "version": older["version"] + 1}))
        with pytest.raises(InputError, match="is not a receipt"):
            distmerge.verify(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "entry",
    [
        {"bytes": 5},
        {"crc32": "00000000", "bytes": 5},
        {"md5": "00", "bytes": 5},
        {"crc32": "0000000g", "bytes": 5},
        {"crc32": "0000000A", "bytes": 5},
        {"crc32": "0" * 9, "bytes": 5},
        {"xxh3": "0" * 64, "bytes": 5},
        {"sha256": "", "bytes": 5},
        {"sha256": "0" * 63 + " ", "bytes": 5},
        {"none": "", "bytes": 5},
        {"sha256": "00", "crc32": "00", "bytes": 5},
        {"sha256": "00"},
        {"sha256": ["00"], "bytes": 5},
        {},
        [],
    ],
    ids=str,
)
def test_a_receipt_with_less_than_its_options_ask_for_is_no_receipt(
    entry: Any, kind: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(outputs[kind], tmp_path / "out"))
    for name in ("config.json", max(out.glob("*.safetensors")).name):
        if name.endswith(".safetensors") and entry == {kind: "00000000", "bytes": 5}:
            continue
        if kind == "none" and name.endswith(".safetensors") and entry == {"bytes": 5}:
            continue
        files = receipt(outputs[kind])["files"]
        edit_json(out / "merge_receipt.json", files={**files, name: entry})
        with pytest.raises(InputError, match="is not a receipt"):
            distmerge.verify(out)


# -- the choice


def test_an_unknown_digest_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="digest 'md5' is none of sha256, crc32, xxh3, none"):
        config_for(base, adapter, tmp_path / "out", digest="md5")


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_travels_to_the_ranks_and_stands_in_the_plan(kind: str, base: Path, adapter: Path) -> None:
    config = config_for(base, adapter, base.parent / "elsewhere", digest=kind)
    argv = config.to_argv()
    assert argv[argv.index("--digest") + 1] == kind
    plan = make_plan(config, "cpu")
    assert (plan.file_digest, plan.fingerprint["--digest"]) == (kind, kind)
    assert plan.reads_back == (kind in ("sha256", "xxh3")) == (plan.followed_nbytes > 0)


def test_a_missing_package_is_refused_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise UsageError("xxhash is not installed")

    monkeypatch.setattr("distmerge.storage.checksums._xxh3", missing)
    for call in (distmerge.plan, distmerge.merge):
        with pytest.raises(UsageError, match="xxhash is not installed"):
            call(config_for(base, adapter, tmp_path / "out", digest="xxh3", nproc=1))
    assert list(tmp_path.iterdir()) == []
