"""What merges on the CPU and on an accelerator have in common: the law, and how many elements differ by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.numerics.rounding import ulp
from tests.factories import load_folder, repack_base, synthetic_adapter, synthetic_base

pytestmark = [pytest.mark.gpu, pytest.mark.real]


@pytest.fixture
def accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        pytest.skip("no accelerator")
    return found.type


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "nf4"])
def test_merges_on_both_devices_keep_the_law_and_rarely_differ(
    packed: bool, dtype: str, accelerator: str, tmp_path: Path, record_property: Any
) -> None:
    base = synthetic_base(tmp_path / "base", layers=2, dtype=dtype)
    lora = synthetic_adapter(tmp_path / "lora", base)
    if packed:
        base = repack_base(base, tmp_path / "packed")
    torch.set_float32_matmul_precision("medium")  # what a program has chosen must not count
    choices = (AdapterChoice(folder=lora),)
    merged = {}
    for device in ("cpu", accelerator):
        out = tmp_path / device
        distmerge.merge(MergeConfig(base=base, adapters=choices, output=out, device=device, nproc=1))
        for judge in ("cpu", accelerator):
            found = distmerge.verify(out, base=base, adapters=choices, device=judge).recomputed
            assert found is not None
            assert found.max_ulp_beyond_noise <= 0.5
        merged[device] = load_folder(out)
    numel = differing = 0
    largest = 0.0
    for name, here in merged["cpu"].items():
        there = merged[accelerator][name]
        numel, differing = numel + here.numel(), differing + int((here != there).sum())
        steps = (here.double() - there.double()).abs() / ulp(here.double(), here.dtype)
        largest = max(largest, float(steps[here.abs() > here.abs().mean() / 100].max()))
    record_property("share that differs", differing / numel)
    record_property("largest difference in ulp", largest)
    print(f"{accelerator}, {dtype}: {100 * differing / numel:.5f} % differ, by {largest:.1f} ulp at most")
    if dtype != "F32":
        assert differing / numel < 1e-3
        assert largest <= 1
    assert torch.get_float32_matmul_precision() == "medium"
