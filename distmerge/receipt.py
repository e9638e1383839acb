"""The receipt: what went in, what was done to it, and what came out, as plain data beside the weights."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distmerge import __version__
from distmerge.config import MergeConfig
from distmerge.errors import InputError
from distmerge.plan import Plan
from distmerge.storage.records import encode
from distmerge.storage.strict_json import read_object
from distmerge.stream import PieceRecord, SegmentRecord

RECEIPT = "merge_receipt.json"
VERSION = 1


def build_ledger(plan: Plan, records: Iterable[SegmentRecord]) -> dict[str, dict[str, Any]]:
    """For every adapter tensor the output tensor it went into, the norm of its delta, and that of the change made.

    Keys are the adapter's own, prefixed with `1:`, `2:`, ... where several adapters were merged.
    """
    pieces: dict[int, list[PieceRecord]] = {}
    for record in sorted(records, key=lambda record: record.segment):
        for piece in record.pieces:
            pieces.setdefault(piece.task, []).append(piece)
    ledger = {}
    for number, task in enumerate(plan.tasks):
        done = pieces.get(number, [])
        norms = next((piece.delta_norms for piece in done if piece.delta_norms), ())
        applied = math.sqrt(math.fsum(piece.applied_squared for piece in done))
        for delta, norm in zip(task.deltas, norms, strict=False):
            prefix = f"{delta.adapter + 1}:" if len(plan.adapters) > 1 else ""
            for spec in (delta.a, delta.b):
                ledger[prefix + spec.name] = {"tensor": task.name, "delta_norm": norm, "applied_norm": applied}
    return ledger


def build_receipt(
    plan: Plan, config: MergeConfig, ledger: dict[str, dict[str, Any]], files: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The receipt of a merge; `files` gives sha256 and bytes of every other file of the output."""
    import torch  # only its version is needed

    return {
        "version": VERSION,
        "plan": plan.digest,
        "base": {"name": config.base.resolve().name, "fingerprint": _base_fingerprint(plan)},
        "adapters": [
            {
                "name": adapter.name,
                "weight": adapter.weight,
                "base_model": adapter.base_model,
                "num_tensors": adapter.num_tensors,
                "fingerprint": adapter.weights_sha256,
                "config_sha256": adapter.config_sha256,
            }
            for adapter in plan.adapters
        ],
        "options": {
            "dtype": config.dtype,
            "max_shard_size": config.max_shard_size,
            "lora_alpha": config.lora_alpha,
            "allow_zero_delta": config.allow_zero_delta,
        },
        "ledger": ledger,
        "files": files,
        "environment": {
            "distmerge": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": plan.fingerprint["device"],
        },
    }


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt in `folder`, or None. Raises InputError for a file that is none."""
    path = folder / RECEIPT
    if not path.is_file():
        return None
    receipt = read_object(path)
    shapes = {"ledger": dict, "files": dict, "adapters": list, "base": dict, "plan": str, "options": dict}
    if receipt.get("version") != VERSION or any(not isinstance(receipt.get(k), t) for k, t in shapes.items()):
        raise InputError("is not a receipt that this version reads", where=str(path))
    return receipt


def merged_adapters(folder: Path) -> set[str]:
    """SHA-256 of the adapters that `folder`, by its receipt, holds already."""
    receipt = read_receipt(folder)
    adapters = receipt["adapters"] if receipt else []
    return {str(adapter.get("fingerprint")) for adapter in adapters if isinstance(adapter, dict)}


def receipt_bytes(receipt: dict[str, Any]) -> bytes:
    """The receipt as the file holds it."""
    return (json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode()


def _base_fingerprint(plan: Plan) -> str:
    marks = {key: value for key, value in plan.fingerprint.items() if key.startswith("base ")}
    return hashlib.sha256(encode(marks).encode()).hexdigest()
