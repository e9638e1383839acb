"""Checksums: CRC-32s of parts join to that of the whole, and every kind gives the values of the reference tools."""

from __future__ import annotations

import builtins
import hashlib
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.errors import UsageError
from distmerge.storage.checksums import crc32, crc32_text, digest_of, join_crc32s, require

DATA = bytes(range(256)) * 37 + b"\0" * 5000 + b"end"


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_crc32s_of_parts_join_to_that_of_the_whole(parts: list[bytes]) -> None:
    assert join_crc32s((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(b"".join(parts))


@given(st.lists(st.integers(0, 1 << 21), max_size=4), st.binary(min_size=1, max_size=9))
def test_crc32s_of_long_parts_join_to_that_of_the_whole(lengths: list[int], seed: bytes) -> None:
    parts = [(seed * (length // len(seed) + 1))[:length] for length in lengths]
    assert join_crc32s((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(b"".join(parts))


@given(st.binary(max_size=20_000), st.integers(0, 2**32 - 1))
def test_the_crc32_is_that_of_zlib_whatever_computes_it(data: bytes, before: int) -> None:
    assert crc32(memoryview(data), before) == zlib.crc32(data, before)


def test_digests_of_a_file_are_those_of_the_reference(tmp_path: Path) -> None:
    import xxhash

    path = tmp_path / "file"
    for data in (b"", DATA, DATA * 1000):
        path.write_bytes(data)
        assert digest_of(path, "sha256") == hashlib.sha256(data).hexdigest()
        assert digest_of(path, "crc32") == crc32_text(zlib.crc32(data)) == f"{zlib.crc32(data):08x}"
        assert digest_of(path, "xxh3") == xxhash.xxh3_64_hexdigest(data)


def test_without_its_package_xxh3_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def lacking(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "xxhash":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "xxhash", raising=False)
    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(UsageError, match="xxhash is not installed") as caught:
        require("xxh3")
    assert "pip install 'distmerge[xxh3]'" in caught.value.hint
    for kind in ("sha256", "crc32", "none"):
        require(kind)
