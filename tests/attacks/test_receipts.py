"""Receipts that somebody else wrote: they are data, checked before they are believed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.errors import DistmergeError, InputError
from distmerge.inspection import inspect
from distmerge.report.folder import write_report
from tests.attacks.scene import Scene, failure


@pytest.fixture(scope="module")
def published(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of the shared base and adapter. Read only."""
    output = tmp_path_factory.mktemp("published") / "out"
    distmerge.merge(MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output))
    return output


@pytest.fixture
def merged(base: Path, adapter: Path, published: Path, tmp_path: Path) -> Scene:
    """A copy of the published output, beside its inputs, which are read only."""
    shutil.copytree(published, tmp_path / "out")
    return Scene(folder=tmp_path, base=base, adapter=adapter, output=tmp_path / "out")


def _spoil(scene: Scene, path: tuple[str | int, ...], value: Any) -> Path:
    file = scene.output / "merge_receipt.json"
    receipt = json.loads(file.read_text())
    inner = receipt
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.write_text(json.dumps(receipt))
    return file


_SHARD = "config.json"
_TENSOR = "model.layers.0.self_attn.q_proj.weight"
_FIELDS: list[tuple[str | int, ...]] = [
    ("version",),
    ("plan",),
    ("base",),
    ("base", "name"),
    ("adapters",),
    ("adapters", 0),
    ("adapters", 0, "name"),
    ("adapters", 0, "weight"),
    ("adapters", 0, "num_tensors"),
    ("adapters", 0, "fingerprint"),
    ("options",),
    ("options", "dtype"),
    ("options", "max_shard_size"),
    ("options", "lora_alpha"),
    ("options", "allow_zero_delta"),
    ("options", "digest"),
    ("ledger",),
    ("ledger", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ("ledger", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "tensor"),
    ("files",),
    ("files", _SHARD),
    ("files", _SHARD, "bytes"),
    ("files", _SHARD, "sha256"),
    ("tensors",),
    ("tensors", _TENSOR),
    ("tensors", _TENSOR, "numel"),
    ("tensors", _TENSOR, "survival"),
    ("tensors", _TENSOR, "survival", "delta_norm"),
    ("tensors", _TENSOR, "survival", "cosine"),
    ("tensors", _TENSOR, "singular_values"),
    ("tensors", _TENSOR, "singular_values", 0),
]


@pytest.mark.parametrize("path", _FIELDS, ids=lambda path: ".".join(map(str, path))[-40:])
@pytest.mark.parametrize("value", [..., None, "x", []], ids=str)
def test_a_spoiled_receipt_is_never_a_traceback(merged: Scene, path: tuple[str | int, ...], value: Any) -> None:
    _spoil(merged, path, value)
    choices = (AdapterChoice(folder=merged.adapter),)
    calls = [
        lambda: distmerge.verify(merged.output),
        lambda: distmerge.verify(merged.output, base=merged.base, adapters=choices),
        lambda: inspect(merged.output),
        lambda: distmerge.plan(merged.config()),
        lambda: distmerge.plan(merged.config(base=merged.output, output=merged.folder / "again")),
        lambda: write_report(merged.output),
        merged.merge,
    ]
    for call in calls:
        error = failure(call)
        assert error is None or error.exit_code in (3, 4), error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("delta_norm", value) for value in (math.nan, math.inf, -1.0, 1e200, 1e-200)),
        *(("cosine", value) for value in (math.nan, 1.5, -2.0)),
        *(("unchanged", value) for value in (math.nan, -0.1, 2.0)),
    ],
)
def test_numbers_that_no_tensor_has_are_refused(merged: Scene, field: str, value: float) -> None:
    _spoil(merged, ("tensors", _TENSOR, "survival", field), value)
    with pytest.raises(InputError, match="is not a receipt"):
        write_report(merged.output)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    "path",
    [
        ("options", "density"),
        ("options", "lora_alpha"),
        ("adapters", 0, "weight"),
        ("ledger", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "delta_norm"),
        ("ledger", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "applied_norm"),
    ],
    ids=str,
)
def test_a_number_of_a_receipt_is_finite_or_it_is_none(merged: Scene, path: tuple[Any, ...], value: float) -> None:
    _spoil(merged, path, value)
    with pytest.raises(InputError, match="is not a receipt"):
        distmerge.verify(merged.output)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", "", "\x1b[31m"])
def test_a_receipt_that_names_other_places_is_not_followed(merged: Scene, name: str) -> None:
    (merged.folder / "secret").write_text("secret")
    _spoil(merged, ("files", name), {"sha256": "0" * 64, "bytes": 6})
    with pytest.raises(DistmergeError) as caught:
        distmerge.verify(merged.output)
    assert "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_receipt_that_lacks_a_file_is_noticed(merged: Scene) -> None:
    shard = sorted(merged.output.glob("*.safetensors"))[0].name
    _spoil(merged, ("files", shard), ...)
    with pytest.raises(DistmergeError):
        distmerge.verify(merged.output)


def test_a_ledger_that_lacks_a_tensor_is_noticed(merged: Scene) -> None:
    _spoil(merged, ("ledger", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), ...)
    with pytest.raises(DistmergeError, match="ledger"):
        distmerge.verify(merged.output)


@pytest.mark.parametrize("metadata", [[], "x", None, {}, {"total_size": "5"}])
def test_an_index_with_other_metadata_is_no_bug(merged: Scene, metadata: Any) -> None:
    import hashlib

    path = merged.output / "model.safetensors.index.json"
    index = {**json.loads(path.read_text()), "metadata": metadata}
    path.write_text(json.dumps(index))
    data = path.read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    _spoil(merged, ("files", path.name), entry)
    with pytest.raises(DistmergeError, match=r"index\.json"):
        distmerge.verify(merged.output)
