"""Compiled arithmetic: it is faster, and changes no weight."""

from __future__ import annotations

import ctypes.util
import json
import shutil
from pathlib import Path

import pytest

from distmerge import share
from distmerge.numerics import compiled, survival
from tests.conftest import tree
from tests.factories import merge


def test_an_installation_without_a_compiler_gives_the_same_weights_and_the_same_figures(
    base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled.arithmetic("cpu") == "torch":
        pytest.skip("installed without a C compiler")
    monkeypatch.setattr(survival, "sums_of_block", lambda *blocks: None)
    monkeypatch.setattr(compiled, "_library", lambda: None)
    monkeypatch.setattr(share, "arithmetic", compiled.arithmetic)
    plain = merge(base, adapter, tmp_path / "out")
    mine, theirs = tree(plain), tree(merged)
    assert {name for name in mine if mine[name] != theirs[name]} <= {"merge_receipt.json"}
    found, expected = (json.loads((folder / "merge_receipt.json").read_text()) for folder in (plain, merged))
    assert found["plan"] != expected["plan"], "one does not resume the other"
    for name, tensor in expected["tensors"].items():
        known = {key: value for key, value in (tensor.pop("survival") or {}).items() if value is not None}
        mine = found["tensors"][name].pop("survival") or {}
        assert {key: mine[key] for key in known} == pytest.approx(known, rel=2e-5)
        assert found["tensors"][name] == tensor


def test_a_library_that_lacks_a_function_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was compiled from an older source and stayed where it was."""
    monkeypatch.setattr(compiled, "_LIBRARY", ctypes.util.find_library("c"))
    compiled._library.cache_clear()
    assert compiled.arithmetic("cpu") == "torch"
    monkeypatch.undo()
    compiled._library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "made"),
    [("cc", True), ("env cc -O0", True), ("cc -include no-such-file", False), ("no-such-compiler", False)],
)
def test_the_package_is_built_with_or_without_a_compiler(
    compiler: str, made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    hatch_build = pytest.importorskip("hatch_build", exc_type=ImportError)  # hatchling may be missing
    source = tmp_path / hatch_build.SOURCE
    source.parent.mkdir(parents=True)
    shutil.copy(hatch_build.SOURCE, source)
    monkeypatch.setenv("CC", compiler)
    assert hatch_build.compiled(tmp_path) == (source.with_name("libsums.so") if made else None)
    assert {path.name for path in source.parent.iterdir()} == {"sums.c"} | ({"libsums.so"} if made else set())
