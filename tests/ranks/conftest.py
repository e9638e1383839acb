"""A base of several shards and many segments, an adapter that takes a while, and what merging them gives."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.plan import Plan
from tests import factories
from tests.conftest import digests, environment, tree


@dataclass(frozen=True)
class Undisturbed:
    """Inputs, and what one process made of them without disturbance."""

    base: Path
    adapter: Path
    files: dict[str, str]
    weights: dict[str, str]
    plan: Plan

    @property
    def args(self) -> tuple[object, ...]:
        return ("--base", self.base, "--adapter", self.adapter)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """258 MB in 3 shards and a LoRA of rank 256, which keeps two ranks busy for seconds. Read only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    base = factories.synthetic_base(folder / "base", layers=3)
    adapter = factories.synthetic_adapter(folder / "adapter", base, r=256)
    output = folder / "merged"
    merge = ["merge", "--base", str(base), "--adapter", str(adapter), "--output", str(output), "--nproc", "1"]
    subprocess.run([sys.executable, "-m", "distmerge", *merge], check=True, timeout=240, env=environment())
    plan = distmerge.plan(
        MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=folder / "elsewhere", device="cpu")
    )
    return Undisturbed(
        base=base,
        adapter=adapter,
        files=tree(output),
        weights=digests(output),
        plan=plan,
    )
