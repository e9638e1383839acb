"""A merge in this process, against float64 arithmetic."""

from __future__ import annotations

from pathlib import Path

import torch

import distmerge
from distmerge import AdapterChoice, MergeConfig
from tests import oracles
from tests.factories import load_folder


def test_merged_elements_are_rounded_once_and_all_others_are_untouched(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    distmerge.merge(MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=out))
    merged, exact = load_folder(out), oracles.merged(load_folder(base), [(adapter, 1.0)])
    changed = oracles.deltas(adapter)
    assert merged.keys() == exact.keys()
    for name, tensor in load_folder(base).items():
        if name in changed:
            oracles.assert_rounded_once(merged[name], *exact[name], terms=8, name=name)
        else:
            assert torch.equal(merged[name], tensor), name


def test_packed_weights_become_what_training_saw_plus_the_delta(
    packed_base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    distmerge.merge(MergeConfig(base=packed_base, adapters=(AdapterChoice(folder=adapter),), output=out))
    merged, exact = load_folder(out), oracles.merged(oracles.dense(load_folder(packed_base)), [(adapter, 1.0)])
    assert merged.keys() == exact.keys()
    for name in exact:
        oracles.assert_rounded_once(merged[name], *exact[name], terms=8, name=name)
