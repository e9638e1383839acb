"""`distmerge inspect`: what a base, an adapter or an output holds, from headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from distmerge.adapter.patterns import time_limit
from distmerge.adapter.peft_adapter import CONFIG, Adapter, AdapterOptions, read_adapter
from distmerge.adapter.saved.folders import is_adapter
from distmerge.adapter.tuners.experts import unwrap
from distmerge.checkpoint.base import RECEIPT, read_base
from distmerge.checkpoint.packing import Foreign
from distmerge.errors import InputError, printable
from distmerge.progress import gigabytes
from distmerge.redaction import redacted

_MAX_LISTED = 12


def inspect(path: Path) -> dict[str, Any]:
    """Facts about the folder or file at `path` as plain data. Raises InputError if it is neither base, adapter nor
    output."""
    if not path.exists():
        raise InputError("no such folder", where=str(path))
    if is_adapter(path):
        return _adapter_facts(path)
    facts = _base(path)
    if not (path / RECEIPT).is_file():
        return facts
    from distmerge.receipt import read_receipt  # torch takes seconds, and only receipts need it

    if receipt := read_receipt(path):
        facts["kind"] = "output"
        facts["merged"] = [
            {"name": adapter.name, "weight": adapter.weight, "num_tensors": adapter.num_tensors}
            for adapter in receipt.adapters
        ]
        facts["base"] = receipt.base.name
        facts["digest"] = receipt.options.digest
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
        lines.append(f"{key.replace('_', ' '):<14}{printable(text, 2000)}")
    return "\n".join(lines)


def _base(folder: Path) -> dict[str, Any]:
    base = read_base(folder)
    formats: Counter[str] = Counter()
    for stored in base.tensors.values():
        dense = stored.packing is not None and not isinstance(stored.packing, Foreign)
        kind = stored.packing.kind if stored.packing else stored.dtype
        formats[f"{kind} ({stored.dtype})" if dense else kind] += 1
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


def _adapter_facts(path: Path) -> dict[str, Any]:
    """An adapter, or why it cannot be merged."""
    try:
        adapter = read_adapter(path, AdapterOptions())
    except InputError as error:
        return {"kind": "adapter", "path": str(path), "mergeable": f"no: {error.what}"} | (
            {"hint": error.hint} if error.hint else {}
        )
    return {"kind": "adapter", "path": str(path), **_described(adapter)}


def _described(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    specs = {view.spec.name: view.spec for view in adapter.views}
    facts = {
        "type": config.peft_type + " (DoRA)" * config.use_dora,
        "mergeable": "yes" if not config.init else f"yes, with the base as it was before {config.init} changed it",
        "base_model": redacted(config.base_model) or "not told",
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "files": len(adapter.files),
        "modules": _counted(Counter(unwrap(name)[0].rsplit(".", 1)[-1] for name in adapter.modules)),
        "dtypes": _counted(Counter(spec.dtype for spec in specs.values())),
    }
    if config.peft_type == "LORA":
        factors = {name: view for name, roles in adapter.modules.items() if (view := roles.get("lora_A.weight"))}
        ranks = {name: view.size[0] for name, view in factors.items() if view.size}
        if config.target_parameters:
            facts["parameters_tuned"] = list(config.target_parameters)
        facts["r"] = _counted(Counter(map(str, ranks.values())))
        with time_limit(str(adapter.folder / CONFIG)):
            facts["alpha"] = _counted(Counter(f"{config.matching_alphas(name)[0]:g}" for name in ranks))
            facts["scaling"] = _counted(Counter(f"{config.scaling(name, r):g}" for name, r in ranks.items()))
    if adapter.full:
        facts["whole"] = sorted(adapter.full)[:_MAX_LISTED]
    if adapter.unused:
        facts["unused"] = _counted(Counter(adapter.unused.values()))
    facts["names"] = _names_of(adapter)
    if adapter.notes:
        facts["notes"] = list(adapter.notes)
    return facts


def _counted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items())[:_MAX_LISTED])


def _names_of(adapter: Adapter) -> str:
    """An example of the names that the adapter uses for modules."""
    names = [*adapter.modules, *adapter.full]
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0] if names else "none"
