"""`distmerge inspect`: what a base, an adapter or an output holds, from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from distmerge.adapter.peft_adapter import read_adapter
from distmerge.checkpoint.base import read_base
from distmerge.errors import InputError, printable
from distmerge.progress import gigabytes
from distmerge.receipt import read_receipt


def inspect(folder: Path) -> dict[str, Any]:
    """Facts about `folder` as plain data. Raises InputError if it is neither base, adapter nor output."""
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder))
    if (folder / "adapter_config.json").exists():
        return _adapter(folder)
    facts = _base(folder)
    if receipt := read_receipt(folder):
        facts["kind"] = "output"
        facts["merged"] = [
            {"name": adapter.name, "weight": adapter.weight, "num_tensors": adapter.num_tensors}
            for adapter in receipt.adapters
        ]
        facts["base"] = receipt.base.name
    return facts


def render(facts: dict[str, Any]) -> str:
    """The facts as aligned lines."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            text = ", ".join(
                f"{name} {count:,}" if isinstance(count, int) else f"{name} {count}" for name, count in value.items()
            )
        elif isinstance(value, list):
            text = ", ".join(
                " ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, dict) else str(item) for item in value
            )
        elif key.startswith("bytes"):
            text = gigabytes(value)
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"{key:<14}{printable(text, 2000)}")
    return "\n".join(lines)


def _base(folder: Path) -> dict[str, Any]:
    base = read_base(folder)
    formats: Counter[str] = Counter()
    for stored in base.tensors.values():
        formats[f"{stored.packing.kind} ({stored.dtype})" if stored.packing else stored.dtype] += 1
    return {
        "kind": "base",
        "path": str(folder),
        "model_type": str(base.config.get("model_type", "unknown")),
        "tensors": len(base.tensors),
        "parameters": sum(stored.numel for stored in base.tensors.values()),
        "bytes": sum(mark.nbytes for mark in base.files),
        "files": len(base.files),
        "formats": dict(sorted(formats.items())),
        **({"warnings": list(base.warnings)} if base.warnings else {}),
    }


def _adapter(folder: Path) -> dict[str, Any]:
    adapter = read_adapter(folder)
    ranks = Counter(pair.r for pair in adapter.pairs)
    modules = Counter(pair.module.rsplit(".", 1)[-1] for pair in adapter.pairs)
    scalings = Counter(f"{adapter.config.scaling(pair.module, pair.r):g}" for pair in adapter.pairs)
    return {
        "kind": "adapter",
        "path": str(folder),
        "base_model": adapter.config.base_model or "not told",
        "tensors": 2 * len(adapter.pairs),
        "parameters": sum(math.prod(spec.shape) for pair in adapter.pairs for spec in (pair.a, pair.b)),
        "modules": dict(sorted(modules.items())),
        "r": {str(r): count for r, count in sorted(ranks.items())},
        "scaling": dict(sorted(scalings.items())),
        "dtypes": dict(sorted(Counter(pair.a.dtype for pair in adapter.pairs).items())),
        **({"warnings": list(adapter.warnings)} if adapter.warnings else {}),
    }
