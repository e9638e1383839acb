"""The scene of the faults: made once for each process of the tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import distmerge
from distmerge import AdapterChoice
from tests.conftest import tree
from tests.faults.attempts import Scene, make_scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A small base and adapter, and a parent of attempts at merging them. What is expected of them is verified against
    float64, and the inputs are what they were in the end."""
    if shutil.which("gcc") is None:
        pytest.skip("faults in system calls are made by a library, and there is no gcc to compile it")
    made = make_scene(tmp_path_factory.mktemp("faults"))
    distmerge.verify(
        made.base.parent / "expected" / "out", base=made.base, adapters=(AdapterChoice(folder=made.adapter),)
    )
    try:
        yield made
    finally:
        made.parent.close()
        found = {str(place): digest for path in (made.base, made.adapter) for place, digest in tree(path).items()}
        assert found == made.inputs


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in memory, where there is some to be had: fsync costs nothing there, and many merges are made."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 64 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="distmerge-faults-", dir=memory) as folder:
        yield Path(folder)
