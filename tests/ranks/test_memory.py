"""Law 4: a rank's memory is bounded by the budget, whatever the size of the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import factories
from tests.conftest import environment

pytestmark = [pytest.mark.ranks, pytest.mark.real, pytest.mark.timeout(900)]

BUDGET = 256 << 20
PEAK = """
import re, sys
from pathlib import Path
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print("peak", peak, file=sys.stderr)
"""
MERGE = "import sys\nfrom distmerge.cli.main import main\ntry:\n  main()\nfinally:\n" + PEAK.replace("\n", "\n  ")


def peak(program: str, *args: object) -> int:
    """The largest resident size, in bytes, of a process that runs `program`."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rsplit("peak ", 1)[1])


def test_peak_memory_does_not_grow_with_the_model_and_keeps_to_the_budget(tmp_path: Path) -> None:
    peaks = {}
    for layers in (2, 10):
        base = factories.repeated_base(tmp_path / "base", layers=layers, hidden=4096, inner=14336)
        nbytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        adapter = factories.synthetic_adapter(tmp_path / "adapter", base)
        output = tmp_path / "merged"
        peaks[nbytes] = peak(
            MERGE,
            *("merge", "--base", base, "--adapter", adapter, "--output", output),
            *("--nproc", 1, "--memory-budget", BUDGET),
        )
        assert json.loads((output / "merge_receipt.json").read_text())["ledger"]
        for folder in (base, adapter, output):
            shutil.rmtree(folder)
    imported = peak("import torch" + PEAK)
    print({f"{nbytes / 1e9:.2f} GB": f"{largest / 2**20:.1f} MiB" for nbytes, largest in peaks.items()})
    print(f"import torch: {imported / 2**20:.1f} MiB, budget: {BUDGET / 2**20:.0f} MiB")
    small, large = peaks.values()
    assert large < 1.05 * small
    assert max(peaks.values()) < imported + BUDGET
