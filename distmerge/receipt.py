"""The receipt: what went in, what was done to it, and what came out, as plain data beside the weights."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from distmerge import __version__
from distmerge.checkpoint.base import RECEIPT, folder_name
from distmerge.config import MergeConfig
from distmerge.errors import InputError, printable, shown
from distmerge.input_files import InputRecord
from distmerge.numerics.survival import Survival, check_sizes, digits, summarize, total
from distmerge.plan import Plan
from distmerge.storage.checksums import HEX_DIGITS
from distmerge.storage.collector import uncollected
from distmerge.storage.records import decode, encode, named_values
from distmerge.storage.strict_json import read_object
from distmerge.stream import PieceRecord, SegmentRecord

VERSION = 4
_SMALLEST_SIZE = 1e-60  # that `check_sizes` lets pass, but for 0
_BEFORE_DIGESTS = 2  # the version in which every file had its SHA-256
_BEFORE_INPUTS = 3  # the version in which no file of an input had one


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedBase:
    """The base by its folder's name and the digest of its files' sizes, times and headers."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """An adapter by its folder's name and the SHA-256 of its weights and its configuration. `names` says how its names
    led to the base's, if not as they stand, and `unused` why tensors of its files were not merged. `initial`
    says that it is what the adapter before it began as, taken off."""

    name: str
    tuner: str
    weight: float
    base_model: str
    num_tensors: int
    fingerprint: str
    config_sha256: str
    names: str
    unused: dict[str, str]
    initial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that decide bytes of the output; `digest` and `hash_inputs` only those of the receipt and the model
    card."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    quantize: Literal["none", "nf4", "fp4"]
    quantize_mode: Literal["plain", "fitted"]
    keep_quantized: bool
    max_shard_size: int | None
    combine: Literal["sum", "ties", "dare_ties", "dare_linear", "magnitude_prune"]
    density: float | None
    seed: int
    simulate_quant: Literal["none", "nf4", "fp4"]
    quant_blocksize: int
    quant_double: bool
    quant_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"]
    quant_skip: tuple[str, ...]
    lora_alpha: float | None
    use_rslora: bool | None
    map: tuple[str, ...]
    expert_b_order: Literal["auto", "peft", "expert-major"]
    allow_pickle: bool
    allow_zero_delta: bool
    digest: Literal["sha256", "crc32", "xxh3", "none"]
    hash_inputs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """Where an adapter tensor went (one tensor, or several), the Frobenius norm of its delta, and that of the change
    made to these tensors. Both are null for a parameter that took the place of the base's."""

    tensor: str | tuple[str, ...]
    delta_norm: float | None
    applied_norm: float | None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """What became of an output tensor of `numel` elements: what is left of its changes after rounding, null for one
    that took the base's place or was only converted; the largest singular values of its changes where they are products
    of factors; how many values are not finite, which only converted tensors may hold."""

    numel: int
    survival: Survival | None
    singular_values: tuple[float, ...]
    not_finite: int

    def __post_init__(self) -> None:
        check_sizes(*self.singular_values)
        if self.numel < 0 or self.not_finite < 0:
            raise ValueError(f"{min(self.numel, self.not_finite)} elements")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the output: its length, and its `digest` in hex, of the kind `kind`; empty for the kind `none`."""

    kind: Literal["sha256", "crc32", "xxh3", "none"]
    digest: str
    bytes: int

    def __post_init__(self) -> None:
        if len(self.digest) != HEX_DIGITS[self.kind] or not set(self.digest) <= set("0123456789abcdef"):
            raise ValueError(f"{self.kind} is {self.digest[:80]!r}")

    def to_values(self) -> dict[str, str | int]:
        """The entry as receipts hold it: `{"sha256": "...", "bytes": 5}`, or `{"bytes": 5}`."""
        digest: dict[str, str | int] = {self.kind: self.digest} if self.digest else {}
        return {**digest, "bytes": self.bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputEntry:
    """A file of an input: its digest, its length, and whether its download tells that the Hub has the same."""

    sha256: str
    bytes: int
    on_hub: bool

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ValueError(f"sha256 is {self.sha256[:80]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What `merge_receipt.json` holds. `plan` is the digest of the plan; ledger keys are the adapter's own tensor
    names, prefixed with `1:`, `2:`, ... where several adapters were merged; `inputs` are the files of the base
    (`base/...`) and the adapters (`adapter 1/...`), if they were hashed; `tensors` are those that were changed or
    replaced, or hold values that are not finite, numbers with 6 significant digits."""

    version: int
    plan: str
    base: MergedBase
    adapters: tuple[MergedAdapter, ...]
    options: Options
    ledger: dict[str, LedgerEntry]
    inputs: dict[str, InputEntry]
    files: dict[str, FileEntry]
    environment: dict[str, str]
    tensors: dict[str, TensorEntry]

    def __post_init__(self) -> None:
        if bool(self.inputs) != self.options.hash_inputs:
            raise ValueError(f"{len(self.inputs)} inputs have digests, hash_inputs is {self.options.hash_inputs}")
        for name, entry in self.files.items():
            if entry.kind != (kind := self.options.digest if name.endswith(".safetensors") else "sha256"):
                raise ValueError(f"{name!r} has the digest {entry.kind}, the options ask for {kind}")

    def to_json(self) -> bytes:
        tables: dict[str, dict[str, Any]] = {"ledger": self.ledger, "tensors": self.tensors}
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in tables}
        values["files"] = {name: entry.to_values() for name, entry in self.files.items()}
        text = json.dumps(values, default=asdict, indent=1, allow_nan=False).removesuffix("\n}")
        for name, table in tables.items():
            text += f',\n "{name}": {_lines(table)}'
        return f"{text}\n}}\n".encode()


def _lines(table: dict[str, Any]) -> str:
    """The table as JSON, a line for each entry: there may be a hundred thousand."""
    encoder = json.JSONEncoder(default=named_values, allow_nan=False)
    rows = [f"  {encoder.encode(name)}: {encoder.encode(entry)}" for name, entry in table.items()]
    return "{\n" + ",\n".join(rows) + "\n }" if rows else "{}"


def build_ledger(plan: Plan, records: Iterable[SegmentRecord]) -> dict[str, LedgerEntry]:
    """An entry for every adapter tensor, from what the records say was done."""
    pieces = _by_task(records)
    went: dict[str, list[tuple[str, float | None, float]]] = {}
    for number, task in enumerate(plan.tasks):
        done = pieces.get(number, [])
        applied = math.fsum(piece.applied_squared for piece in done)
        for place, change in enumerate(task.changes):
            delta = math.fsum(piece.delta_squared[place] for piece in done)
            for key in change.keys:
                went.setdefault(ledger_key(plan, change.adapter, key), []).append((task.name, delta, applied))
        for owner, key in task.adapter_keys:
            name = ledger_key(plan, owner, key)
            if all(task.name != known for known, _, _ in went.get(name, [])):
                went.setdefault(name, []).append((task.name, None, applied))
    return {key: _entry(places) for key, places in went.items()}


def build_tensors(plan: Plan, records: Iterable[SegmentRecord]) -> dict[str, TensorEntry]:
    """An entry for every tensor of which there is something to say, by name, from what the records say was done."""
    found = {}
    for number, done in sorted(_by_task(records).items()):
        task = plan.tasks[number]
        sums = [piece.sums for piece in done if piece.sums is not None]
        not_finite = sum(piece.not_finite for piece in done)
        if sums or task.origin or not_finite:
            found[task.name] = TensorEntry(
                numel=task.source.numel,
                survival=summarize(total(sums)) if sums else None,
                singular_values=tuple(_size(value) for piece in done for value in piece.singular),
                not_finite=not_finite,
            )
    return found


def _size(value: float) -> float:
    """`value` as a receipt holds it: a product of factors may be smaller than all that float32 tensors can have."""
    return digits(value) if value > _SMALLEST_SIZE else 0.0


def _by_task(records: Iterable[SegmentRecord]) -> dict[int, list[PieceRecord]]:
    """The pieces of each task, in the order of its blocks."""
    pieces: dict[int, list[PieceRecord]] = {}
    for record in sorted(records, key=lambda record: record.segment):
        for piece in record.pieces:
            pieces.setdefault(piece.task, []).append(piece)
    return pieces


def _entry(places: list[tuple[str, float | None, float]]) -> LedgerEntry:
    names = tuple(dict.fromkeys(name for name, _, _ in places))
    norms = [delta for _, delta, _ in places]
    known = [norm for norm in norms if norm is not None]
    applied = {name: squared for name, _, squared in places}
    whole = len(known) == len(norms)
    return LedgerEntry(
        tensor=names[0] if len(names) == 1 else names,
        delta_norm=math.sqrt(math.fsum(known)) if whole else None,
        applied_norm=math.sqrt(math.fsum(applied.values())) if whole else None,
    )


def ledger_key(plan: Plan, adapter: int, key: str) -> str:
    """The key under which the ledger lists tensor `key` of adapter number `adapter`, counted from 0."""
    return f"{adapter + 1}:{key}" if len(plan.adapters) > 1 else key


def build_receipt(
    plan: Plan,
    config: MergeConfig,
    ledger: dict[str, LedgerEntry],
    tensors: dict[str, TensorEntry],
    files: dict[str, FileEntry],
    *,
    inputs: Iterable[InputRecord],
) -> Receipt:
    """The receipt of a merge; `files` are all other files of the output, `inputs` those of base and adapters that were
    hashed."""
    import torch  # only its version is needed

    return Receipt(
        version=VERSION,
        plan=plan.digest,
        base=MergedBase(name=folder_name(config.base), fingerprint=_base_fingerprint(plan)),
        adapters=tuple(
            MergedAdapter(
                name=adapter.name,
                tuner=adapter.tuner,
                weight=adapter.weight,
                base_model=adapter.base_model,
                num_tensors=adapter.num_tensors,
                fingerprint=adapter.weights_sha256,
                config_sha256=adapter.config_sha256,
                names=adapter.names,
                unused=adapter.unused,
                initial=adapter.initial,
            )
            for adapter in plan.adapters
        ),
        options=_options(config),
        ledger=ledger,
        inputs={each.name: InputEntry(sha256=each.sha256, bytes=each.nbytes, on_hub=each.on_hub) for each in inputs},
        files=files,
        environment={
            "distmerge": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": plan.fingerprint["device"],
        },
        tensors=tensors,
    )


def _options(config: MergeConfig) -> Options:
    made: Options = decode(
        Options,
        {
            "dtype": config.dtype,
            "quantize": config.quantize,
            "quantize_mode": config.quantize_mode,
            "keep_quantized": config.keep_quantized,
            "max_shard_size": config.max_shard_size,
            "combine": config.combine,
            "density": config.density,
            "seed": config.seed,
            "simulate_quant": config.simulate_quant,
            "quant_blocksize": config.quant_blocksize,
            "quant_double": config.quant_double,
            "quant_compute_dtype": config.quant_compute_dtype,
            "quant_skip": list(config.quant_skip),
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "map": list(config.map),
            "expert_b_order": config.expert_b_order,
            "allow_pickle": config.allow_pickle,
            "allow_zero_delta": config.allow_zero_delta,
            "digest": config.digest,
            "hash_inputs": config.hash_inputs,
        },
    )
    return made


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt in `folder`, or None. Raises InputError for a file that is none."""
    path = folder / RECEIPT
    if not path.is_file():
        return None
    values = read_object(path)
    if values.get("version") not in range(_BEFORE_DIGESTS, VERSION + 1):
        raise InputError(
            f"is a receipt of version {shown(values.get('version'))}, this distmerge reads versions {_BEFORE_DIGESTS} "
            f"to {VERSION}",
            where=str(path),
            hint="use the distmerge that wrote it (`environment`), or merge again",
        )
    try:
        with uncollected():
            receipt: Receipt = decode(Receipt, _with_kinds(values))
        _check_finite(receipt)
    except ValueError as error:
        raise InputError(f"is not a receipt ({printable(str(error))})", where=str(path)) from None
    return receipt


def _check_finite(receipt: Receipt) -> None:
    norms = (norm for entry in receipt.ledger.values() for norm in (entry.delta_norm, entry.applied_norm))
    told = (receipt.options.density, receipt.options.lora_alpha, *(adapter.weight for adapter in receipt.adapters))
    if not all(number is None or math.isfinite(number) for number in (*told, *norms)):
        raise ValueError("holds a number that is not finite")


def _with_kinds(values: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a receipt, with its files as fields of a FileEntry. Raises ValueError where it cannot be."""
    options, files = values.get("options"), values.get("files")
    if not isinstance(options, dict) or not isinstance(files, dict):
        raise ValueError("no options or no files")
    if values["version"] <= _BEFORE_DIGESTS:
        options = {**options, "digest": "sha256"}
    if values["version"] <= _BEFORE_INPUTS:
        options, values = {**options, "hash_inputs": False}, {**values, "inputs": {}}
    entries = {}
    for name, value in files.items():
        if not isinstance(value, dict) or len(value) > 2 or "bytes" not in value or "none" in value:
            raise ValueError(f"not a file: {str(value)[:80]}")
        digests = [(kind, digest) for kind, digest in value.items() if kind != "bytes"]
        kind, digest = digests[0] if digests else ("none", "")
        entries[name] = {"kind": kind, "digest": digest, "bytes": value["bytes"]}
    return {**values, "options": options, "files": entries}


def hashed(files: Iterable[FileEntry]) -> str:
    """How many files were hashed, and what became of the others, in words."""
    kinds = Counter(entry.kind for entry in files)
    text = f"{kinds['sha256'] + kinds['xxh3']} files hashed"
    text += f", {kinds['crc32']} with a CRC-32 alone" * bool(kinds["crc32"])
    return text + f", {kinds['none']} without a digest" * bool(kinds["none"])


def merged_adapters(folder: Path) -> set[str]:
    """SHA-256 of the adapters that `folder`, by its receipt, holds already."""
    receipt = read_receipt(folder)
    return {adapter.fingerprint for adapter in receipt.adapters} if receipt else set()


def _base_fingerprint(plan: Plan) -> str:
    marks = {key: value for key, value in plan.fingerprint.items() if key.startswith("base ")}
    return hashlib.sha256(encode(marks).encode()).hexdigest()
