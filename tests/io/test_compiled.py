"""Compiled arithmetic: it is faster, and gives the weights that torch gives."""

from __future__ import annotations

import ctypes.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distmerge.numerics import compiled
from distmerge.numerics.rounding import distance
from tests.conftest import tree
from tests.factories import merge


def test_an_installation_without_a_compiler_gives_the_same_weights_and_the_same_figures(
    base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled.arithmetic("cpu") == "torch":
        pytest.skip("installed without a C compiler")
    monkeypatch.setattr(compiled, "_levels", tuple)
    plain = merge(base, adapter, tmp_path / "out")
    mine, theirs = tree(plain), tree(merged)
    weights = {name for name in mine if name.endswith(".safetensors")}
    assert {name for name in mine if mine[name] != theirs[name]} <= {"merge_receipt.json", *weights}
    for name in weights:
        ours, expected_tensors = load_file(plain / name), load_file(merged / name)
        for tensor, expected_values in expected_tensors.items():
            # A tie that float32 noise decides is a rare one, and costs one rounding.
            off = distance(ours[tensor], expected_values.double(), torch.zeros(expected_values.shape).double())
            assert off.max_ulp <= 1
            assert off.num_not_nearest <= expected_values.numel() // 1000
    found, expected = (json.loads((folder / "merge_receipt.json").read_text()) for folder in (plain, merged))
    assert found["plan"] != expected["plan"], "one does not resume the other"
    for name, tensor in expected["tensors"].items():
        known = {key: value for key, value in (tensor.pop("survival") or {}).items() if value is not None}
        mine = found["tensors"][name].pop("survival") or {}
        assert {key: mine[key] for key in known} == pytest.approx(known, rel=2e-3)
        assert found["tensors"][name] == tensor


@pytest.mark.parametrize("other", ["library", "source", "no source"])
def test_a_library_of_another_source_is_not_used(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was compiled before an update and stayed where it was."""
    if other == "library":
        monkeypatch.setattr(compiled, "_LIBRARY", ctypes.util.find_library("c"))
    elif other == "source":
        sources = [Path(shutil.copy(path, tmp_path)) for path in compiled._SOURCES]
        sources[-1].write_text(sources[-1].read_text() + "//\n")
        monkeypatch.setattr(compiled, "_SOURCES", sources)
    else:
        monkeypatch.setattr(compiled, "_SOURCES", [tmp_path / "none"])
    for known in (compiled._library, compiled._levels):
        known.cache_clear()
    assert compiled.arithmetic("cpu") == "torch"
    monkeypatch.undo()
    for known in (compiled._library, compiled._levels):
        known.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "made"),
    [("env cc -O0", True), ("cc -include no-such-file", False), ("no-such-compiler", False)],
)
def test_the_package_is_built_with_or_without_a_compiler(
    compiler: str, made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    hatch_build = pytest.importorskip("hatch_build", exc_type=ImportError)  # hatchling may be missing
    folder = tmp_path / hatch_build.SOURCE.parent
    shutil.copytree(hatch_build.SOURCE.parent, folder)
    before = set(tmp_path.rglob("*"))
    monkeypatch.setenv("CC", compiler)
    library = tmp_path / hatch_build.LIBRARY
    assert hatch_build.compiled(tmp_path) == (library if made else None)
    assert set(tmp_path.rglob("*")) == before | ({library} if made else set())
    if made:
        found = ctypes.CDLL(str(library)).source
        found.restype = ctypes.c_char_p
        assert found().decode() == compiled._digest()


@pytest.mark.parametrize(("name", "value"), [("CC", "no-such-compiler"), ("DISTMERGE_PURE", "1")])
def test_an_editable_installation_that_compiles_nothing_keeps_no_library(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hatch_build = pytest.importorskip("hatch_build", exc_type=ImportError)
    library = tmp_path / hatch_build.LIBRARY
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setenv(name, value)
    hook = hatch_build.CompiledKernels(str(tmp_path), {}, None, None, str(tmp_path), "wheel")
    for version, stays in (("standard", True), ("editable", False)):
        hook.initialize(version, data := {})
        assert (library.exists(), data) == (stays, {})
