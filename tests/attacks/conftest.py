"""Inputs that each test may spoil: copies of the shared ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.attacks.scene import Scene, small_scene


def _scene(folder: Path, base: Path, adapter: Path) -> Scene:
    scene = Scene(folder=folder, base=folder / "base", adapter=folder / "lora", output=folder / "out")
    shutil.copytree(base, scene.base)
    shutil.copytree(adapter, scene.adapter)
    return scene


@pytest.fixture
def scene(base: Path, adapter: Path, tmp_path: Path) -> Scene:
    """A bf16 base in shards, a fitting adapter, an output that is not there."""
    return _scene(tmp_path, base, adapter)


@pytest.fixture
def small(tmp_path: Path) -> Scene:
    """A model of one tuned layer, quick to plan."""
    return small_scene(tmp_path)


@pytest.fixture
def packed_scene(packed_base: Path, adapter: Path, tmp_path: Path) -> Scene:
    """The same with the NF4 base in one file."""
    scene = _scene(tmp_path, packed_base, adapter)
    scene.single()
    return scene
