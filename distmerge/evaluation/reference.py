"""The unmerged base as training saw it: its own folder, or a dense copy of it that distmerge's own reader makes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from distmerge.checkpoint.base import INDEX, Base
from distmerge.checkpoint.packing import Foreign
from distmerge.checkpoint.quantization import drop_sections
from distmerge.errors import InputError
from distmerge.layout import Kind, Wanted, cut_segments, place
from distmerge.plan import Plan, count_lanes
from distmerge.share import wanted_lanes
from distmerge.storage.files import write_exact
from distmerge.stream import Stream


def dense_nbytes(base: Base) -> int:
    """Bytes of disk that `dense_base` takes. Raises InputError for tensors that cannot be dequantized."""
    return _plan(base).nbytes_to_write if base.packed else 0


def dense_base(base: Base, folder: Path, *, memory_budget: int) -> Path:
    """A folder that transformers loads the floats of `base` from: its own where nothing is packed, or a copy in
    `folder`.

    A packed tensor is dequantized as for a merge, not by bitsandbytes, whose CPU kernel is wrong where rows are no
    multiple of the block size, and which does not know a base that is simulated. Raises InputError for tensors that
    cannot be dequantized.
    """
    if not base.packed:
        return base.folder
    plan = _plan(base)
    folder.mkdir()

    def opened(number: int) -> int:
        return os.open(folder / plan.files[number].name, os.O_RDWR)

    for number, file in enumerate(plan.files):
        fd = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_exact(fd, memoryview(plan.header_of(number)), 0, file.name)
        finally:
            os.close(fd)
    lanes = count_lanes(plan, memory_budget, wanted=wanted_lanes(1))
    stream = Stream(plan, base.folder, (), opened, device=torch.device("cpu"), num_lanes=lanes)
    try:
        for segment in range(len(plan.segments)):
            stream.run(segment, lambda: None)
    finally:
        stream.close()
    weight_map = {task.name: plan.files[task.file].name for task in plan.tasks}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    config = json.loads(json.dumps(base.config))
    drop_sections(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _plan(base: Base) -> Plan:
    """A plan that merges nothing: every tensor of `base`, dense, in a file like its own."""
    shards: dict[str, list[Wanted]] = {}
    for name, stored in base.tensors.items():
        if isinstance(stored.packing, Foreign):
            raise InputError(
                f"is packed by {stored.packing.kind}, which cannot be dequantized: there is no model to compare with",
                where=f"{base.folder}: {name}",
                hint="distmerge verify --depth full recomputes every tensor that the merge has changed",
            )
        kind: Kind = "convert" if stored.packing else "copy"
        wanted = Wanted(kind=kind, name=name, source=stored, origin=0, dtype=stored.dtype, changes=())
        shards.setdefault(stored.data.file, []).append(wanted)
    names = {shard: f"model-{number:05}-of-{len(shards):05}.safetensors" for number, shard in enumerate(shards, 1)}
    files, tasks = place({names[shard]: wanted for shard, wanted in shards.items()})
    return Plan(
        fingerprint={},
        base_files=base.files,
        adapters=(),
        files=files,
        tasks=tasks,
        segments=cut_segments(tasks),
        side_files=(),
        config_json=None,
        notes=(),
        warnings=(),
    )
