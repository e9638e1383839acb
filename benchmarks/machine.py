"""The machine that a benchmark ran on, in a few words that make figures comparable."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any


def describe(folder: Path) -> dict[str, Any]:
    """Processor, cores, memory, kernel, the file system of `folder`, versions and date."""
    import torch

    import distmerge

    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "l2_l3": _caches(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(folder),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distmerge": distmerge.__version__,
        "arithmetic": _arithmetic(),
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _caches() -> str:
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [folder / f"index{number}" / "size" for number in (2, 3)]
    return ", ".join(path.read_text().strip() for path in sizes if path.exists())


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, from the longest mount point above it."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    place = str(folder.resolve()) + "/"
    above = [(len(at), kind) for _, at, kind, *_ in mounts if place.startswith(at.rstrip("/") + "/")]
    return max(above)[1] if above else ""


def _arithmetic() -> str:
    """What sums the survival of changes: compiled code, or torch."""
    if importlib.util.find_spec("distmerge.numerics.compiled") is None:
        return "torch"
    return str(importlib.import_module("distmerge.numerics.compiled").arithmetic("cpu"))


def _commit() -> str:
    """The commit, `-dirty` where files differ from it, but for the logs, which every benchmark writes."""

    def told(*words: str) -> str:
        folder = Path(__file__).parents[1]
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder, check=False).stdout.strip()

    changed = told("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return told("describe", "--always") + "-dirty" * bool(changed)
