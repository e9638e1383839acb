"""What a merge says of how much of each change is left, against float64 and against merges in other pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import factories, oracles
from tests.conftest import tree
from tests.factories import load_folder, merge

V = "model.layers.0.self_attn.v_proj.weight"


def tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_receipt.json").read_text())["tensors"]
    return found


def assert_true(entry: dict[str, Any], base: Tensor, delta: Tensor, out: Tensor) -> None:
    """`entry` is what float64 makes of these tensors; float32 noise moves tiny deltas a little."""
    found, applied = entry["survival"], out.double() - base.double()
    assert entry["numel"] == base.numel()
    assert entry["not_finite"] == 0
    assert found["base_norm"] == pytest.approx(float(base.double().norm()), rel=1e-5)
    assert found["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert found["applied_norm"] == pytest.approx(float(applied.norm()), rel=1e-5)
    cosine = float((applied * delta).sum() / applied.norm() / delta.norm())
    assert found["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["unchanged"] == pytest.approx(float((out == base).double().mean()), rel=1e-5)
    assert found["largest_delta"] == pytest.approx(float(delta.abs().max()), rel=1e-4)


@pytest.mark.parametrize("scale", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_changed_tensor_is_listed_with_what_float64_says_is_left_of_its_change(
    dtype: torch.dtype, scale: float, tmp_path: Path
) -> None:
    base = factories.save_base(tmp_path / "base", dtype)
    adapter = factories.save_adapter(tmp_path / "lora", scale=scale)
    out = merge(base, adapter, tmp_path / "out")
    before, after, deltas = load_folder(base), load_folder(out), oracles.deltas(adapter)
    assert tensors(out).keys() == deltas.keys()
    for name, entry in tensors(out).items():
        assert_true(entry, before[name], deltas[name][0], after[name])
        expected = torch.linalg.svdvals(deltas[name][0])[:4].tolist()
        assert entry["singular_values"] == pytest.approx(expected, rel=1e-5)


def test_on_a_packed_base_the_change_is_that_to_its_dense_values(
    packed_base: Path, adapter: Path, merged_nf4: Path
) -> None:
    before, after = oracles.dense(load_folder(packed_base)), load_folder(merged_nf4)
    for name, entry in tensors(merged_nf4).items():
        assert_true(entry, before[name], oracles.deltas(adapter)[name][0], after[name])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_in_another_output_dtype_it_is_still_held_against_the_bases_own_values(
    dtype: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = merge(base, adapter, tmp_path / "out", dtype=dtype)
    before, after = load_folder(base), load_folder(out)
    for name, entry in tensors(out).items():
        assert_true(entry, before[name], oracles.deltas(adapter)[name][0], after[name])
        assert dtype != "float32" or entry["survival"]["cosine"] == 1.0


def test_the_deltas_of_several_adapters_count_together(
    base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    weighted = [(adapter, 0.7), (other_adapter, -0.4)]
    out = merge(base, weighted, tmp_path / "out")
    before, after, both = load_folder(base), load_folder(out), {}
    for folder, weight in weighted:
        for name, (delta, _) in oracles.deltas(folder, weight).items():
            both[name] = both.get(name, 0) + delta
    assert tensors(out).keys() == both.keys()
    for name, entry in tensors(out).items():
        assert_true(entry, before[name], both[name], after[name])
        expected = torch.linalg.svdvals(both[name])[: len(entry["singular_values"])].tolist()
        assert entry["singular_values"] == pytest.approx(expected, rel=1e-5)


def test_what_operators_and_combinations_add_is_what_was_added_in_the_end(
    base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    dora = factories.save_adapter(tmp_path / "dora", use_dora=True)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (dora, {}),
        ([(adapter, 0.7), (other_adapter, 0.4)], {"combine": "ties", "density": 0.3}),
    ]
    for number, (adapters, options) in enumerate(cases):
        # A float32 output of the same float values is the base with all that was added.
        exact = load_folder(merge(base, adapters, tmp_path / f"exact{number}", dtype="float32", **options))
        out = merge(base, adapters, tmp_path / f"out{number}", **options)
        before, after = load_folder(base), load_folder(out)
        for name, entry in tensors(out).items():
            assert_true(entry, before[name], exact[name].double() - before[name].double(), after[name])
            assert entry["singular_values"] == []


def test_a_tensor_that_took_the_bases_place_is_listed_without_a_change(base: Path, tmp_path: Path) -> None:
    adapter = factories.save_adapter(tmp_path / "lora", modules_to_save=["lm_head"], target_modules=["q_proj"])
    found = tensors(merge(base, adapter, tmp_path / "out"))
    assert found["lm_head.weight"]["survival"] is None
    assert found["lm_head.weight"]["singular_values"] == []
    assert found["lm_head.weight"]["numel"] == 96 * 64
    assert found["model.layers.0.self_attn.q_proj.weight"]["survival"] is not None


def test_values_that_are_not_finite_are_counted_where_a_tensor_is_only_converted(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a.weight": torch.randn(8, 8, generator=generator), "b.weight": torch.randn(8, 8, generator=generator)}
    weights["b.weight"][1, 2], weights["b.weight"][3, 4] = torch.inf, torch.nan
    base = factories.write_base(tmp_path / "base", weights)
    adapter = factories.write_adapter(tmp_path / "lora", {"a": (torch.randn(2, 8), torch.randn(8, 2))})
    found = tensors(merge(base, adapter, tmp_path / "out", dtype="bfloat16"))
    assert (found["b.weight"]["not_finite"], found["b.weight"]["survival"]) == (2, None)
    assert found["a.weight"]["not_finite"] == 0
    assert tensors(merge(base, adapter, tmp_path / "copy")).keys() == {"a.weight"}


def test_the_receipt_is_the_same_for_every_number_of_lanes_and_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = factories.synthetic_base(tmp_path / "base", layers=2, hidden=1024, inner=1536)
    adapter = factories.synthetic_adapter(tmp_path / "lora", base, r=8)
    expected = tree(merge(base, adapter, tmp_path / "out"))
    for lanes in (1, 5):
        monkeypatch.setattr("distmerge.share.wanted_lanes", lambda _, lanes=lanes: lanes)
        out = merge(base, adapter, tmp_path / f"out{lanes}", memory_budget=(64 << 20) * lanes)
        assert tree(out) == expected
    assert len(tensors(tmp_path / "out")) == 10


# -- what is said of it


@pytest.mark.parametrize("scale", [1.0, 0.0002])
def test_a_merge_warns_once_when_a_tune_is_being_lost_and_only_then(
    scale: float, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(base, [(adapter, scale)], tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("warning  the tune is being lost") == (scale < 1)
    assert ("--dtype float32" in said) == (scale < 1)
    merge(base, [(adapter, scale)], tmp_path / "wide", dtype="float32")
    assert "lost" not in capsys.readouterr().err


def test_the_warning_names_how_many_tensors_and_the_worst(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merge(base, [(adapter, 0.0002)], tmp_path / "out")
    before, after = load_folder(base), load_folder(out)
    kept, cosines = {}, {}
    for name, (delta, _) in oracles.deltas(adapter, 0.0002).items():
        applied = after[name].double() - before[name].double()
        kept[name] = float((applied * delta).sum() / (delta * delta).sum())
        cosines[name] = float((applied * delta).sum() / applied.norm() / delta.norm())
    lost = [name for name in kept if min(kept[name], cosines[name]) < 0.5]
    worst = min(kept, key=lambda name: min(kept[name], cosines[name]))
    assert f"of 14 changed tensors {len(lost)} keep" in (said := capsys.readouterr().err)
    figure = f"cosine {cosines[worst]:.2f}" if cosines[worst] < kept[worst] else f"{100 * kept[worst]:.0f} % left"
    assert f"least {worst} ({figure})" in said


def test_the_card_says_how_much_of_the_change_is_left(merged: Path) -> None:
    found = [entry["survival"]["cosine"] for entry in tensors(merged).values()]
    assert f"{min(found):.4f} to {max(found):.4f} over 14 tensors" in (merged / "README.md").read_text()
