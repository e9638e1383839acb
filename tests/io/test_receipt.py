"""The receipt, and the audit that holds an output against it and against float64."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import distmerge
from distmerge import AdapterChoice
from distmerge.checkpoint.header import TensorSpec, read_header
from distmerge.errors import InputError, VerifyError
from tests import oracles
from tests.conftest import tree
from tests.factories import edit_json, load_folder, merge

V, K = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def receipt(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge_receipt.json").read_text())


def spec_of(folder: Path, name: str) -> TensorSpec:
    found = [spec for path in folder.glob("*.safetensors") for spec in read_header(path).tensors]
    return next(spec for spec in found if spec.name == name)


def write_over(folder: Path, spec: TensorSpec, data: bytes) -> None:
    """Replaces a tensor's bytes and tells the receipt the new digest, as someone who wants to deceive would."""
    path = folder / spec.file
    content = path.read_bytes()
    path.write_bytes(content[: spec.begin] + data + content[spec.begin + spec.nbytes :])
    files = receipt(folder)["files"]
    files[spec.file]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(folder / "merge_receipt.json", files=files)


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.mark.parametrize("which", ["base", "packed_base"])
def test_the_ledger_lists_every_adapter_tensor_with_its_tensor_and_its_true_norms(
    which: str, adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = oracles.dense(load_folder(request.getfixturevalue(which)))
    out = merge(request.getfixturevalue(which), adapter, tmp_path / "out")
    ledger, merged, deltas = receipt(out)["ledger"], load_folder(out), oracles.deltas(adapter)
    assert ledger.keys() == load_file(adapter / "adapter_model.safetensors").keys()
    for key, entry in ledger.items():
        name = entry["tensor"]
        assert key.startswith(f"base_model.model.{name.removesuffix('.weight')}.lora_")
        applied = torch.linalg.norm(merged[name].double() - base[name].double())
        assert entry["delta_norm"] == pytest.approx(float(torch.linalg.norm(deltas[name][0])), rel=1e-6)
        assert entry["applied_norm"] == pytest.approx(float(applied), rel=1e-6)


def test_the_ledger_keeps_several_adapters_apart(
    base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    weighted = [(adapter, 0.7), (other_adapter, -0.4)]
    ledger = receipt(merge(base, weighted, tmp_path / "out"))["ledger"]
    for number, (folder, weight) in enumerate(weighted, start=1):
        deltas = oracles.deltas(folder, weight)
        keys = load_file(folder / "adapter_model.safetensors").keys()
        assert {f"{number}:{key}" for key in keys} == {key for key in ledger if key.startswith(f"{number}:")}
        for key in keys:
            entry = ledger[f"{number}:{key}"]
            norm = float(torch.linalg.norm(deltas[entry["tensor"]][0]))
            assert entry["delta_norm"] == pytest.approx(norm, rel=1e-6)


def test_the_receipt_gives_the_true_digest_of_every_other_file(merged: Path) -> None:
    files = receipt(merged)["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == {
        name: digest for name, digest in tree(merged).items() if name != "merge_receipt.json"
    }
    assert all(entry["bytes"] == (merged / name).stat().st_size for name, entry in files.items())


def test_the_receipt_says_what_went_in_and_names_no_folder(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    found = receipt(merged)
    weights = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (found["adapters"][0]["fingerprint"], found["adapters"][0]["weight"]) == (weights, 1.0)
    assert found["adapters"][0]["num_tensors"] == len(found["ledger"]) == 28
    assert found["base"]["name"] == base.name
    assert str(base.parent) not in (merged / "merge_receipt.json").read_text()


@pytest.mark.parametrize("which", [("base", "merged"), ("packed_base", "merged_nf4")], ids=["plain", "packed"])
def test_verify_passes_on_a_merge_with_and_without_its_inputs(
    which: tuple[str, str], adapter: Path, request: pytest.FixtureRequest
) -> None:
    base, merged = (request.getfixturevalue(name) for name in which)
    found = distmerge.verify(merged)
    assert (found.num_adapter_tensors, found.recomputed) == (28, None)
    again = distmerge.verify(merged, base=base, adapters=(AdapterChoice(folder=adapter),)).recomputed
    assert again is not None
    assert again.num_tensors == 14
    assert 0.4 < again.max_ulp_beyond_noise <= 0.5
    assert again.share_not_nearest < 0.01


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"max_shard_size": 30_000}, {"lora_alpha": 2.0}], ids=str)
def test_verify_recomputes_under_the_options_of_the_merge(
    options: dict[str, Any], base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    weighted = [(adapter, 0.7), (other_adapter, -0.4)]
    out = merge(base, weighted, tmp_path / "out", **options)
    choices = tuple(AdapterChoice(folder=folder, weight=weight) for folder, weight in weighted)
    assert distmerge.verify(out, base=base, adapters=choices).recomputed is not None


@pytest.mark.parametrize("place", [0, 9, 200, -1], ids=["length", "header", "header's middle", "last byte"])
def test_verify_finds_a_flipped_bit_in_a_weight_file(place: int, out: Path) -> None:
    path = min(out.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerifyError, match="sha256 is"):
        distmerge.verify(out)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "change", [lambda p: p.write_bytes(p.read_bytes() + b" "), Path.unlink], ids=["longer", "gone"]
)
def test_verify_finds_a_changed_or_missing_side_file(name: str, change: Callable[[Path], None], out: Path) -> None:
    change(out / name)
    with pytest.raises(VerifyError, match=r"bytes|is missing"):
        distmerge.verify(out)


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "pytorch_model.bin", "adapter_config.json"])
def test_verify_finds_files_that_loaders_would_pick_up(name: str, out: Path) -> None:
    (out / name).write_bytes(b"{}")
    with pytest.raises(VerifyError, match="loaders would pick up"):
        distmerge.verify(out)


def swapped(out: Path, base: dict[str, Tensor]) -> None:
    merged = load_folder(out)
    write_over(out, spec_of(out, K), bytes_of(merged[V]))
    write_over(out, spec_of(out, V), bytes_of(merged[K]))


def negated(out: Path, base: dict[str, Tensor]) -> None:
    merged = load_folder(out)[V].float()
    write_over(out, spec_of(out, V), bytes_of((2 * base[V].float() - merged).bfloat16()))


def not_applied(out: Path, base: dict[str, Tensor]) -> None:
    write_over(out, spec_of(out, V), bytes_of(base[V]))


def applied_twice(out: Path, base: dict[str, Tensor]) -> None:
    merged = load_folder(out)[V].float()
    write_over(out, spec_of(out, V), bytes_of((2 * merged - base[V].float()).bfloat16()))


def one_step_off(out: Path, base: dict[str, Tensor]) -> None:
    merged = load_folder(out)[V]
    merged.view(torch.int16)[3, 5] += 1
    write_over(out, spec_of(out, V), bytes_of(merged))


def untouched_changed(out: Path, base: dict[str, Tensor]) -> None:
    head = base["lm_head.weight"].clone()
    head.view(torch.int16)[-1, -1] ^= 1
    write_over(out, spec_of(out, "lm_head.weight"), bytes_of(head))


@pytest.mark.parametrize("harm", [swapped, negated, not_applied, applied_twice, one_step_off, untouched_changed])
def test_verify_finds_wrong_values_even_where_the_digests_were_fixed_up(
    harm: Callable[[Path, dict[str, Tensor]], None], out: Path, base: Path, adapter: Path
) -> None:
    harm(out, load_folder(base))
    distmerge.verify(out)  # digests and headers are all right
    with pytest.raises(VerifyError):
        distmerge.verify(out, base=base, adapters=(AdapterChoice(folder=adapter),))


def change_ledger(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    ledger = receipt(out)["ledger"]
    change(ledger)
    edit_json(out / "merge_receipt.json", ledger=ledger)


@pytest.mark.parametrize(
    "change",
    [
        lambda ledger: ledger.pop(min(ledger)),
        lambda ledger: ledger.update({"base_model.model.more.lora_A.weight": next(iter(ledger.values()))}),
        lambda ledger: next(iter(ledger.values())).update(tensor="nowhere.weight"),
    ],
    ids=["an entry less", "an entry more", "a tensor that is not there"],
)
def test_verify_finds_a_ledger_that_does_not_fit(change: Callable[[dict[str, Any]], object], out: Path) -> None:
    change_ledger(out, change)
    with pytest.raises(VerifyError, match="ledger"):
        distmerge.verify(out)


@pytest.mark.parametrize(
    "change",
    [
        lambda ledger: next(iter(ledger.values())).update(tensor="lm_head.weight"),
        lambda ledger: ledger.update({"base_model.model.more.lora_A.weight": ledger.pop(min(ledger))}),
    ],
    ids=["another tensor", "another key"],
)
def test_verify_with_the_inputs_finds_a_ledger_that_is_not_theirs(
    change: Callable[[dict[str, Any]], object], out: Path, base: Path, adapter: Path
) -> None:
    change_ledger(out, change)
    with pytest.raises(VerifyError, match="ledger"):
        distmerge.verify(out, base=base, adapters=(AdapterChoice(folder=adapter),))


def test_verify_refuses_other_adapters_or_weights_than_the_receipts(
    merged: Path, base: Path, adapter: Path, other_adapter: Path
) -> None:
    one, other = AdapterChoice(folder=adapter), AdapterChoice(folder=other_adapter)
    for choices in ((other,), (one, other), (AdapterChoice(folder=adapter, weight=2.0),)):
        with pytest.raises(InputError, match="not those of the receipt"):
            distmerge.verify(merged, base=base, adapters=choices)


def test_verify_says_what_it_takes(base: Path, tmp_path: Path) -> None:
    for folder in (base, tmp_path / "nothing"):
        with pytest.raises(InputError, match="holds no merge_receipt"):
            distmerge.verify(folder)
