"""Times merges of a synthetic bfloat16 model against `cp` of the same files, as pairs in one run.

Prints a table of wall times and ratios to cp (both with everything on disk at the end). What it does not show: other
disks, GPUs, packed bases. The first touch of memory in a virtual machine can be slow, so a round is thrown away first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.factories import synthetic_adapter, synthetic_base

_NAIVE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
base, adapter, out = map(Path, sys.argv[1:])
factors = load_file(adapter / "adapter_model.safetensors")
out.mkdir()
for path in sorted(base.glob("*.safetensors")):
    tensors = load_file(path)
    for name in tensors:
        key = "base_model.model." + name.removesuffix(".weight")
        delta = factors[key + ".lora_B.weight"] @ factors[key + ".lora_A.weight"] * 2.0
        tensors[name] = (tensors[name].float() + delta).bfloat16()
    save_file(tensors, out / path.name, metadata={"format": "pt"})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="92 MB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        base = synthetic_base(folder / "base", layers=args.layers)
        adapter = synthetic_adapter(folder / "adapter", base)
        _print(_measure(folder, base, adapter, args.rounds), base)


def _measure(folder: Path, base: Path, adapter: Path, rounds: int) -> dict[str, list[float]]:
    out = folder / "out"
    merge = [sys.executable, "-m", "distmerge", "merge", "--base", base, "--adapter", adapter, "--output", out]
    contestants: dict[str, Callable[[], object]] = {
        "cp": lambda: shutil.copytree(base, out),
        "distmerge, 1 rank": lambda: _call([*merge, "--nproc", "1"]),
        "distmerge, 2 ranks": lambda: _call([*merge, "--nproc", "2"]),
        "load, add, save, shard by shard": lambda: _call([sys.executable, "-c", _NAIVE, base, adapter, out]),
        "import torch": lambda: _call([sys.executable, "-c", "import torch"]),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, run in contestants.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            started = time.monotonic()
            run()
            os.sync()
            if round_number:
                times[name].append(time.monotonic() - started)
    return times


def _call(command: list[object]) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def _print(times: dict[str, list[float]], base: Path) -> None:
    nbytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"{nbytes / 1e9:.2f} GB in bfloat16, every tensor merged, r 16; medians of {len(times['cp'])} rounds\n")
    print("| | seconds | x cp |\n| --- | --- | --- |")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["cp"], strict=True))
        print(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
