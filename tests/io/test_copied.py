"""Untouched tensors: where no checksum of them is wanted, the kernel copies them, and nobody need notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distmerge import reader
from distmerge.storage.files import copy_range
from tests.conftest import digests
from tests.factories import merge, save_adapter


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that leaves most of the tensors alone."""
    return save_adapter(tmp_path_factory.mktemp("few") / "lora", target_modules=["q_proj"])


@pytest.fixture(scope="module")
def expected(base: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Its merge, every byte of which went through the lanes."""
    return digests(merge(base, few, tmp_path_factory.mktemp("expected") / "out"))


@pytest.fixture
def run(base: Path, few: Path, tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Merges with that digest."""
    return lambda digest: digests(merge(base, few, tmp_path / "out", digest=digest))


def all_of_it(*where: int) -> int:
    return copy_range(*where)


def half_of_it(source: int, begin: int, fd: int, offset: int, nbytes: int) -> int:
    return copy_range(source, begin, fd, offset, nbytes // 2)


def nothing(*where: int) -> int:
    return 0


@pytest.mark.parametrize("copied", [all_of_it, half_of_it, nothing])
def test_what_the_kernel_copies_is_what_would_have_been_read_and_written(
    copied: Callable[..., int],
    run: Callable[[str], dict[str, str]],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []

    def counted(*where: int) -> int:
        counts.append(copied(*where))
        return counts[-1]

    monkeypatch.setattr(reader, "copy_range", counted)
    assert run("none") == expected
    assert len(counts) > 10
    assert (sum(counts) > 0) == (copied is not nothing)


def test_bytes_that_get_a_checksum_are_read(
    run: Callable[[str], dict[str, str]], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "copy_range", lambda *where: pytest.fail("copied unseen"))
    assert run("crc32") == expected


def test_a_copy_that_the_system_refuses_copies_nothing(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"0123456789")
    (tmp_path / "to").write_bytes(b"----------")
    with (tmp_path / "from").open("rb") as source, (tmp_path / "to").open("r+b") as target:
        assert copy_range(source.fileno(), 2, target.fileno(), 1, 5) == 5
        assert copy_range(source.fileno(), 8, target.fileno(), 6, 5) == 2, "the file ends"
        assert copy_range(target.fileno(), 0, source.fileno(), 0, 5) == 0, "not open for writing"
    assert (tmp_path / "to").read_bytes() == b"-2345689--"
