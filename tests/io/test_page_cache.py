"""The page cache: a model that is larger than memory does not push everything else out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distmerge import page_cache, reader, work
from tests.conftest import tree
from tests.factories import merge


@pytest.fixture(params=["base", "packed_base"])
def pair(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A base and its merge."""
    merged = {"base": "merged", "packed_base": "merged_nf4"}[request.param]
    return request.getfixturevalue(request.param), request.getfixturevalue(merged)


@pytest.mark.parametrize("memory", [1, 1 << 50], ids=["small machine", "large machine"])
def test_what_was_read_is_dropped_only_where_the_model_does_not_fit(
    memory: int, pair: tuple[Path, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merged = pair
    dropped: list[tuple[str, int, int]] = []
    written: list[tuple[int, int]] = []
    drop = reader.drop_cache

    def note(fd: int, offset: int, nbytes: int) -> None:
        dropped.append((os.path.realpath(f"/proc/self/fd/{fd}"), offset, nbytes))
        drop(fd, offset, nbytes)

    monkeypatch.setattr(reader, "drop_cache", note)
    monkeypatch.setattr(work, "drop_cache", lambda fd, offset, nbytes: written.append((offset, nbytes)))
    monkeypatch.setattr(page_cache, "memory_nbytes", lambda: memory)
    assert tree(merge(base, adapter, tmp_path / "out")) == tree(merged)
    if memory > 1:
        assert dropped == written == []
        return
    assert sorted(written) == sorted((0, path.stat().st_size) for path in merged.glob("*.safetensors"))
    assert {path for path, _, _ in dropped} == {str(path.resolve()) for path in base.glob("*.safetensors")}
    for path, offset, nbytes in dropped:
        assert 8 < offset <= offset + nbytes <= os.stat(path).st_size, "only data that was read"
    assert sum(nbytes for _, _, nbytes in dropped) > 0.5 * sum(p.stat().st_size for p in base.glob("*.safetensors"))
