"""What planning costs, by the number of tensors: CPU seconds and peak memory of a process of its own for each size.

The bases are DeepSeek-V3's with more or fewer layers and experts, headers only, their matrices a sixteenth as high and
wide so that an adapter for all of them is small. `few` adapters tune the attention, `all` every linear there is. The
last row is the model as it is on the Hub, in its own sizes: 163 files of FP8, 671 billion parameters.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.shapes import DEEPSEEK_SHARD, DeepSeek, write_headers, write_lora

SIZES = {
    "1k": DeepSeek(layers=7, experts=64, fp8=False, shrink=16),
    "10k": DeepSeek(layers=28, experts=128, fp8=False, shrink=16),
    "30k": DeepSeek(layers=42, experts=256, fp8=False, shrink=16),
    "100k": DeepSeek(layers=88, experts=384, fp8=False, shrink=16),
    "671B": DeepSeek(),
}
_COLUMNS = ("tensors", "files", "pairs", "import", "headers", "plan", "write", "read", "whole", "MB", "manifest MB")


def measure(folder: Path) -> dict[str, Any]:
    """Plans the merge in `folder` in this process: CPU seconds of each step, and the peak of its memory.

    `headers` is the part of `plan` that reads the base, `write` makes the manifest and its digest, and `read` is what
    every other rank does with it, in another process.
    """
    import torch

    from distmerge.config import AdapterChoice, MergeConfig
    from distmerge.manifest import Manifest
    from distmerge.plan import make_plan

    torch.set_num_threads(1)
    found: dict[str, Any] = {"import": time.process_time()}
    config = MergeConfig(
        base=folder / "base", adapters=(AdapterChoice(folder=folder / "adapter", weight=1.0),), output=folder / "out"
    )
    plan = _timed(found, "plan", lambda: make_plan(config, "cpu"))
    manifest = _timed(found, "write", lambda: Manifest.of(plan))
    (folder / "manifest.json").write_bytes(manifest.data)
    found |= {"files": len(plan.files), "pairs": sum(len(task.changes) for task in plan.tasks)}
    found |= {"manifest MB": len(manifest.data) / 1e6, **_usage()}
    from distmerge.checkpoint.base import read_base

    base = _timed(found, "headers", lambda: read_base(folder / "base"))
    return {**found, "tensors": sum(len(stored.specs) for stored in base.tensors.values())}


def measure_reading(folder: Path) -> dict[str, Any]:
    """Reads the manifest in `folder` in this process, as a rank does that has not made it."""
    from distmerge.manifest import Manifest

    found: dict[str, Any] = {}
    manifest = Manifest.found((folder / "manifest.json").read_bytes())
    assert manifest is not None
    plan = _timed(found, "read", manifest.plan)
    assert plan is not None
    assert plan.lane_nbytes + plan.loading_nbytes > 0
    return {**found, "read MB": _usage()["MB"]}


def _timed(found: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = work()
    found[name] = time.process_time() - started
    return result


def _usage() -> dict[str, Any]:
    return {"whole": time.process_time(), "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _row(shape: DeepSeek, folder: Path, *, experts: bool) -> dict[str, Any]:
    write_headers(folder / "base", shape, shard_nbytes=DEEPSEEK_SHARD / shape.shrink**2)
    write_lora(folder / "adapter", shape, experts=experts)
    found: dict[str, Any] = {}
    for step in ("--measure", "--measure-reading"):
        command = [sys.executable, __file__, step, str(folder)]
        found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    """Prints a row for each size, or what one process of it has measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure-reading", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure or options.measure_reading:
        step = measure(options.measure) if options.measure else measure_reading(options.measure_reading)
        print(json.dumps(step))
        return
    print(f"{'':10}" + "".join(f"{column:>12}" for column in (*_COLUMNS, "read MB")))
    for name in options.sizes:
        for experts in (False, True) if SIZES[name].shrink > 1 else (False,):
            with tempfile.TemporaryDirectory() as folder:
                row = _row(SIZES[name], Path(folder), experts=experts)
            label = f"{name} {'all' if experts else 'few'}"
            cells = (row[column] for column in (*_COLUMNS, "read MB"))
            print(
                f"{label:10}" + "".join(f"{c:>12.2f}" if isinstance(c, float) else f"{c:>12}" for c in cells),
                flush=True,
            )


if __name__ == "__main__":
    main()
