"""Law 1 for combined adapters: a tensor that several ranks share has one threshold and one mask."""

from __future__ import annotations

from pathlib import Path

import pytest

import distmerge
from distmerge import AdapterChoice, MergeConfig
from tests import factories
from tests.conftest import Command, tree

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    """A base of one layer whose largest tensors lie in several segments, and two LoRAs."""
    folder = tmp_path_factory.mktemp("combine")
    base = factories.synthetic_base(folder / "base", layers=1, hidden=1024, inner=12000)
    loras = factories.synthetic_adapter(folder / "a", base, r=4), factories.synthetic_adapter(folder / "b", base, r=9)
    return base, loras


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_every_file_is_the_same_for_one_two_and_three_ranks(
    method: str, inputs: tuple[Path, tuple[Path, Path]], distmerge: Command, tmp_path: Path
) -> None:
    base, (first, second) = inputs
    factories.merge(base, [(first, 0.7), (second, -0.4)], tmp_path / "one", combine=method, density=0.2)
    args = ["merge", "--base", base, "--adapter", first, "--weight", 0.7, "--adapter", second, "--weight", -0.4]
    args += ["--combine", method, "--density", 0.2]
    distmerge(*args, "--output", tmp_path / "two", "--memory-budget", "128MiB", "--nproc", 2)
    distmerge(*args, "--output", tmp_path / "three", "--nproc", 3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")


def test_the_largest_tensors_of_the_inputs_lie_in_several_segments(
    inputs: tuple[Path, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, loras = inputs
    plan = distmerge.plan(
        MergeConfig(
            base=base,
            adapters=tuple(AdapterChoice(folder=lora) for lora in loras),
            output=tmp_path / "out",
            device="cpu",
            combine="ties",
            density=0.2,
        )
    )
    homes: dict[int, int] = {}
    for segment in plan.segments:
        for piece in segment.pieces:
            homes[piece.task] = homes.get(piece.task, 0) + 1
    assert max(homes.values()) > 1
