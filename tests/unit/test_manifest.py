"""The manifest: the plan comes back as it was, and no changed byte goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes import DeepSeek, write_headers, write_lora
from distmerge.config import AdapterChoice, MergeConfig
from distmerge.layout import pack_shards
from distmerge.manifest import Manifest
from distmerge.plan import Plan, make_plan
from tests.factories import plan_of, wanted

SMALL = plan_of(pack_shards([wanted(f"t{i}", (40, 30), r=i % 3) for i in range(7)], 5000))
SAID = replace(SMALL, notes=('a note with ,"said": in it',), warnings=('{"plan":',))


@pytest.mark.parametrize("which", ["base", "packed_base", "mixture"])
def test_a_plan_comes_back_equal_from_its_manifest(
    which: str, adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if which == "mixture":
        shape = DeepSeek(layers=4, experts=5, shrink=64)
        folder = write_headers(tmp_path / "base", shape, shard_nbytes=1e6)
        adapter = write_lora(tmp_path / "adapter", shape, experts=True)
    else:
        folder = request.getfixturevalue(which)
    plan = make_plan(
        MergeConfig(base=folder, adapters=(AdapterChoice(folder=adapter),), output=tmp_path / "out"), "cpu"
    )
    manifest = Manifest.found(Manifest.of(plan).data)
    assert manifest is not None
    again = manifest.plan()
    assert again == plan
    assert again is not None
    assert again.digest == manifest.digest == replace(again).digest == replace(plan).digest


def test_what_a_plan_only_says_is_in_the_manifest_and_not_in_its_digest() -> None:
    manifest = Manifest.found(Manifest.of(SAID).data)
    assert manifest is not None
    assert manifest.plan() == SAID
    assert manifest.digest == SMALL.digest
    assert json.loads(manifest.data)["said"]["notes"] == [*SAID.notes]


@given(st.data())
def test_a_changed_byte_gives_another_digest_or_no_plan(data: st.DataObject) -> None:
    whole = Manifest.of(SMALL).data
    end = whole.index(b',"said":')
    place, byte = data.draw(st.integers(0, end + 7)), data.draw(st.integers(0, 255))
    changed = whole[:place] + bytes([byte]) + whole[place + 1 :]
    found = Manifest.found(changed)
    assert changed == whole or found is None or found.digest != SMALL.digest


def test_what_follows_the_plan_in_a_manifest_takes_no_place_of_what_was_hashed() -> None:
    whole, other = Manifest.of(SMALL).data, plan_of(pack_shards([wanted("t", (40, 30))], 5000))
    twice = b'%s,"plan":%s}' % (whole[:-1], other.canonical())
    inside = whole.replace(b',"said":{', b',"said":{"tasks":[],')
    for data in (twice, inside):
        found = Manifest.found(data)
        assert data != whole
        assert found is not None
        assert found.digest == SMALL.digest
        assert found.plan() == SMALL


@pytest.mark.parametrize("fault", ["version", "fewer", "more", "other types"])
def test_a_manifest_that_is_not_of_this_version_or_form_holds_no_plan(fault: str) -> None:
    values = json.loads(Manifest.of(SMALL).data)
    if fault == "version":
        values["version"] = 1
    elif fault == "fewer":
        del values["plan"]["tasks"][0][0]
    elif fault == "more":
        values["plan"]["tasks"][0].append(None)
    else:
        values["plan"]["segments"][0][0] = "0"
    found = Manifest.found(json.dumps(values, separators=(",", ":")).encode())
    assert found is not None
    assert found.plan() is None


def test_a_mixture_in_fp8_is_planned_from_headers_alone(tmp_path: Path) -> None:
    shape = DeepSeek(layers=5, experts=6)
    base = write_headers(tmp_path / "base", shape, shard_nbytes=1e9)
    adapter = write_lora(tmp_path / "adapter", shape)
    plan: Plan = make_plan(
        MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=tmp_path / "out"), "cpu"
    )
    names = [name for name, _, _ in shape.tensors()]
    assert {task.name for task in plan.tasks} == {name for name in names if not name.endswith("_scale_inv")}
    assert {task.kind for task in plan.tasks if task.source.packing} == {"convert", "merge"}
    assert sum(task.kind == "merge" for task in plan.tasks) == 6 * 5  # layers, with the one that predicts further
    allocated = sum(path.stat().st_blocks * 512 for path in base.iterdir())
    assert allocated < 2e6
    assert sum(path.stat().st_size for path in base.iterdir()) > 1e9
