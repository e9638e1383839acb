"""The receipt: what went in, what was done to it, and what came out, as plain data beside the weights."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from distmerge import __version__
from distmerge.adapter.resolve import Delta
from distmerge.checkpoint.base import RECEIPT, folder_name
from distmerge.config import MergeConfig
from distmerge.errors import InputError, printable
from distmerge.plan import Plan
from distmerge.storage.records import decode, encode
from distmerge.storage.strict_json import read_object
from distmerge.stream import PieceRecord, SegmentRecord

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedBase:
    """The base by its folder's name and the digest of its files' sizes, times and headers."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """An adapter by its folder's name and the SHA-256 of its weights and its configuration."""

    name: str
    weight: float
    base_model: str
    num_tensors: int
    fingerprint: str
    config_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that decide bytes of the output."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    max_shard_size: int | None
    lora_alpha: float | None
    allow_zero_delta: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """Where an adapter tensor went, the Frobenius norm of its delta, and that of the change made to the tensor."""

    tensor: str
    delta_norm: float
    applied_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the output."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What `merge_receipt.json` holds. `plan` is the digest of the plan; ledger keys are the adapter's own tensor
    names, prefixed with `1:`, `2:`, ... where several adapters were merged."""

    version: int
    plan: str
    base: MergedBase
    adapters: tuple[MergedAdapter, ...]
    options: Options
    ledger: dict[str, LedgerEntry]
    files: dict[str, FileEntry]
    environment: dict[str, str]

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, allow_nan=False) + "\n").encode()


def build_ledger(plan: Plan, records: Iterable[SegmentRecord]) -> dict[str, LedgerEntry]:
    """An entry for every adapter tensor, from what the records say was done."""
    pieces: dict[int, list[PieceRecord]] = {}
    for record in sorted(records, key=lambda record: record.segment):
        for piece in record.pieces:
            pieces.setdefault(piece.task, []).append(piece)
    ledger: dict[str, LedgerEntry] = {}
    for number, task in enumerate(plan.tasks):
        done = pieces.get(number, [])
        norms = next((piece.delta_norms for piece in done if piece.delta_norms), ())
        applied = math.sqrt(math.fsum(piece.applied_squared for piece in done))
        for delta, norm in zip(task.deltas, norms, strict=True):
            entry = LedgerEntry(tensor=task.name, delta_norm=norm, applied_norm=applied)
            ledger |= dict.fromkeys(ledger_keys(plan, delta), entry)
    return ledger


def ledger_keys(plan: Plan, delta: Delta) -> tuple[str, str]:
    """The keys under which the ledger lists the two tensors of `delta`."""
    prefix = f"{delta.adapter + 1}:" if len(plan.adapters) > 1 else ""
    return prefix + delta.a.name, prefix + delta.b.name


def build_receipt(
    plan: Plan, config: MergeConfig, ledger: dict[str, LedgerEntry], files: dict[str, FileEntry]
) -> Receipt:
    """The receipt of a merge; `files` are all other files of the output."""
    import torch  # only its version is needed

    return Receipt(
        version=VERSION,
        plan=plan.digest,
        base=MergedBase(name=folder_name(config.base), fingerprint=_base_fingerprint(plan)),
        adapters=tuple(
            MergedAdapter(
                name=adapter.name,
                weight=adapter.weight,
                base_model=adapter.base_model,
                num_tensors=adapter.num_tensors,
                fingerprint=adapter.weights_sha256,
                config_sha256=adapter.config_sha256,
            )
            for adapter in plan.adapters
        ),
        options=decode(
            Options,
            {
                "dtype": config.dtype,
                "max_shard_size": config.max_shard_size,
                "lora_alpha": config.lora_alpha,
                "allow_zero_delta": config.allow_zero_delta,
            },
        ),
        ledger=ledger,
        files=files,
        environment={
            "distmerge": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": plan.fingerprint["device"],
        },
    )


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt in `folder`, or None. Raises InputError for a file that is none."""
    path = folder / RECEIPT
    if not path.is_file():
        return None
    values = read_object(path)
    if values.get("version") != VERSION:
        raise InputError("is not a receipt that this version reads", where=str(path))
    try:
        receipt: Receipt = decode(Receipt, values)
    except ValueError as error:
        raise InputError(f"is not a receipt ({printable(str(error))})", where=str(path)) from None
    return receipt


def merged_adapters(folder: Path) -> set[str]:
    """SHA-256 of the adapters that `folder`, by its receipt, holds already."""
    receipt = read_receipt(folder)
    return {adapter.fingerprint for adapter in receipt.adapters} if receipt else set()


def _base_fingerprint(plan: Plan) -> str:
    marks = {key: value for key, value in plan.fingerprint.items() if key.startswith("base ")}
    return hashlib.sha256(encode(marks).encode()).hexdigest()
