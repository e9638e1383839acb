"""The plan: every decision of a merge, made from headers and small files before the first byte is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from distmerge import __version__
from distmerge.adapter.peft_adapter import WEIGHTS, Adapter, read_adapter
from distmerge.adapter.resolve import Delta, resolve, untouched_targets
from distmerge.checkpoint.base import INDEX, RECEIPT, Base, FileMark, folder_name, read_base
from distmerge.checkpoint.formats import Stored
from distmerge.checkpoint.header import FLOATS, ITEMSIZE, build_header
from distmerge.checkpoint.sidefiles import SideFile, find_side_files, output_config
from distmerge.config import DEFAULT_SHARD_NBYTES, DTYPES, MergeConfig
from distmerge.errors import InputError, listing
from distmerge.layout import BLOCK_NUMEL, OutputFile, Segment, Task, Wanted, cut_segments, pack_shards, place
from distmerge.storage.files import lookup_errors
from distmerge.storage.records import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedAdapter:
    """An adapter as the plan and the receipt name it."""

    name: str
    base_model: str
    weight: float
    weights_sha256: str
    config_sha256: str
    num_tensors: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every task of a run and where its bytes go. Names no absolute path and no rank: equal inputs and options give an
    equal plan. The times of the base's files belong to the inputs, since a header does not show that data changed."""

    fingerprint: dict[str, str]
    base_files: tuple[FileMark, ...]
    adapters: tuple[PlannedAdapter, ...]
    files: tuple[OutputFile, ...]
    tasks: tuple[Task, ...]
    segments: tuple[Segment, ...]
    side_files: tuple[SideFile, ...]
    config_json: str | None
    warnings: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the plan as canonical JSON, without its warnings."""
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "warnings"}
        return hashlib.sha256(encode(content).encode()).hexdigest()

    @cached_property
    def _by_file(self) -> list[list[Task]]:
        groups: list[list[Task]] = [[] for _ in self.files]
        for task in self.tasks:
            groups[task.file].append(task)
        return groups

    def tasks_of(self, file: int) -> list[Task]:
        return self._by_file[file]

    def segments_of(self, file: int) -> list[int]:
        """The numbers of the segments of a file, in the order of its bytes."""
        return [number for number, segment in enumerate(self.segments) if segment.file == file]

    def header_of(self, file: int) -> bytes:
        return build_header([(task.name, task.dtype, task.source.shape) for task in self.tasks_of(file)])

    @property
    def nbytes_to_write(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def factors_nbytes(self) -> int:
        """Bytes that loading the factors of one tensor takes at most: as stored, in float32, and for their norm."""
        return max(
            (sum(8 * (d.a.numel + d.b.numel) + 24 * d.a.shape[0] ** 2 for d in task.deltas) for task in self.tasks),
            default=0,
        )

    @property
    def block_nbytes(self) -> int:
        """Bytes of the largest block of the output."""
        return max(ITEMSIZE[task.dtype] for task in self.tasks) * BLOCK_NUMEL

    @property
    def lane_nbytes(self) -> int:
        """Bytes of the buffers through which one block passes (see stream.Lane)."""
        stored = max(task.stored_block_nbytes for task in self.tasks)
        packed = any(task.source.packing for task in self.tasks)
        return stored + self.block_nbytes + 4 * BLOCK_NUMEL + packed * (4 + 2) * BLOCK_NUMEL


def make_plan(config: MergeConfig, device: str) -> Plan:
    """The plan of `config` on devices of type `device`. Reads headers and small files of the base, and the adapters
    whole, once. Raises InputError for everything that cannot be merged; writes nothing."""
    from distmerge.adapter.screen import screen  # the only part of planning that needs torch

    with lookup_errors(config.base):
        base = read_base(config.base)
        adapters = [read_adapter(choice.folder, lora_alpha=config.lora_alpha) for choice in config.adapters]
    deltas: dict[str, tuple[Delta, ...]] = {}
    warnings = list(base.warnings)
    planned = []
    for number, (choice, adapter) in enumerate(zip(config.adapters, adapters, strict=True)):
        for name, delta in resolve(adapter, number, choice.weight, base).items():
            deltas[name] = (*deltas.get(name, ()), delta)
        mark, notes = screen(adapter, allow_zero_delta=config.allow_zero_delta)
        planned.append(
            PlannedAdapter(
                name=folder_name(adapter.folder),
                base_model=adapter.config.base_model,
                weight=choice.weight,
                weights_sha256=mark.weights_sha256,
                config_sha256=mark.config_sha256,
                num_tensors=2 * len(adapter.pairs),
            )
        )
        warnings += [*adapter.warnings, *notes, *_doubts(adapter, base)]
    files, tasks = place(_shards(base, deltas, config))
    dtypes: Counter[str] = Counter()
    for task in tasks:
        dtypes[task.dtype] += task.source.numel
    config_json = output_config(base, dict(dtypes), recast=config.dtype != "auto") if base.config else None
    made = {"README.md", RECEIPT, INDEX, *(file.name for file in files)}
    if config_json is not None:
        made.add("config.json")
    plan = Plan(
        fingerprint=_fingerprint(config, base, planned, device),
        base_files=base.files,
        adapters=tuple(planned),
        files=files,
        tasks=tasks,
        segments=cut_segments(tasks),
        side_files=find_side_files(
            base.folder,
            tuple(adapter.folder for adapter in adapters),
            weights=(tuple(mark.name for mark in base.files), *((WEIGHTS,) for _ in adapters)),
            made=made,
        ),
        config_json=config_json.decode() if config_json is not None else None,
        warnings=tuple(warnings),
    )
    count_lanes(plan, config.memory_budget, wanted=1)
    return plan


def count_lanes(plan: Plan, memory_budget: int, *, wanted: int) -> int:
    """How many of `wanted` lanes fit the budget beside the factors. Raises InputError if not even one does."""
    # Each lane may be at another tensor, and the factors of one more are being loaded.
    factors, lane = plan.factors_nbytes, plan.lane_nbytes + plan.factors_nbytes
    if (fits := (memory_budget - factors) // lane) < 1:
        needed = factors + lane
        raise InputError(
            f"{memory_budget} bytes are too few: one block and the largest factors take {needed}",
            where="--memory-budget",
            hint=f"--memory-budget {-(-needed // (1 << 20))}MiB",
        )
    return min(wanted, fits)


def _shards(base: Base, deltas: dict[str, tuple[Delta, ...]], config: MergeConfig) -> dict[str, list[Wanted]]:
    wanted = [_want(stored, deltas.get(stored.name, ()), DTYPES[config.dtype]) for stored in base.tensors.values()]
    if base.packed or config.max_shard_size is not None:
        return pack_shards(wanted, config.max_shard_size or DEFAULT_SHARD_NBYTES)
    shards: dict[str, list[Wanted]] = {mark.name: [] for mark in base.files}
    for tensor in wanted:
        shards[tensor.source.data.file].append(tensor)
    return {name: shard for name, shard in shards.items() if shard}


def _want(stored: Stored, deltas: tuple[Delta, ...], dtype: str | None) -> Wanted:
    # F64 stays: torch rounds it to 16 bits by way of float32, that is twice.
    out = dtype if dtype is not None and stored.dtype in FLOATS else stored.dtype
    same = out == stored.dtype and stored.packing is None
    return Wanted(kind="merge" if deltas else "copy" if same else "convert", source=stored, dtype=out, deltas=deltas)


def _doubts(adapter: Adapter, base: Base) -> list[str]:
    """What does not stop a merge but is worth a look before it."""
    name, told = adapter.folder.name, adapter.config.base_model
    doubts = []
    own = str(base.config.get("_name_or_path") or "") or folder_name(base.folder)
    if told and told.rstrip("/").split("/")[-1].lower() not in (own.rstrip("/").split("/")[-1].lower(), ""):
        doubts.append(f"{name}: trained on {told!r}, merged into {own!r}")
    if not base.packed and any(mark in told.lower() for mark in ("4bit", "nf4", "int4")):
        doubts.append(f"{name}: trained on a 4-bit base ({told!r}), merged into 16-bit weights that it has never seen")
    if missing := untouched_targets(adapter, base):
        doubts.append(f"{name}: {len(missing)} targeted modules have no weights in the adapter: {listing(missing, 3)}")
    return doubts


def _fingerprint(config: MergeConfig, base: Base, adapters: list[PlannedAdapter], device: str) -> dict[str, str]:
    """What must be equal for a run to continue another: everything that can change a byte of the output."""
    import torch  # only its version is needed

    marks: dict[str, Any] = {"distmerge": __version__, "torch": torch.__version__, "device": device}
    marks |= {"--dtype": config.dtype, "--max-shard-size": config.max_shard_size, "--lora-alpha": config.lora_alpha}
    for file in base.files:
        marks[f"base {file.name}"] = f"{file.nbytes} bytes, mtime {file.mtime_ns}, header {file.header_sha256}"
    for number, adapter in enumerate(adapters, start=1):
        marks[f"adapter {number}"] = f"weights {adapter.weights_sha256}, config {adapter.config_sha256}"
        marks[f"adapter {number} --weight"] = adapter.weight
    return {key: str(value) for key, value in marks.items()}
