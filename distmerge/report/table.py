"""The plan as a table for people and as JSON for programs."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from typing import Any

from distmerge.checkpoint.packed_form import PackedForm
from distmerge.checkpoint.packing import Simulated
from distmerge.config import MergeConfig
from distmerge.plan import Plan, count_lanes
from distmerge.progress import gigabytes
from distmerge.room import files_needed
from distmerge.storage.files import free_files, free_nbytes
from distmerge.storage.memory import memory_left

_DIGESTS = {
    "sha256": "SHA-256 of every weight file, read back while it is written",
    "xxh3": "XXH3 of every weight file, read back while it is written",
    "crc32": "CRC-32 of every weight file, of what is written; nothing is read back",
    "none": "none of weight files: only their lengths can be checked, and only whole files are kept for a resumed run",
}


def plan_facts(plan: Plan, config: MergeConfig, *, wanted_lanes: int, room_nbytes: int, nproc: int) -> dict[str, Any]:
    """What the plan means for the machine, as plain data: counts, bytes, memory for each rank, room, warnings."""
    kinds: dict[str, dict[str, int]] = {}
    for task in plan.tasks:
        kind = kinds.setdefault(task.kind, {"tensors": 0, "bytes_read": 0, "bytes_written": 0})
        kind["tensors"] += 1
        kind["bytes_read"] += task.source.nbytes_read
        kind["bytes_written"] += task.nbytes
    packings = [task.source.packing for task in plan.tasks]
    formats = Counter(packing.kind for packing in packings if packing and not isinstance(packing, Simulated))
    left = memory_left(nproc)
    budget = min(config.memory_budget, max(left.left, plan.least_nbytes))
    lanes = count_lanes(plan, budget, wanted=wanted_lanes)
    buffers = lanes * (plan.lane_nbytes + plan.held_nbytes) + plan.loading_nbytes
    reading = plan.followed_nbytes
    device = plan.fingerprint["device"]
    return {
        "plan": plan.digest,
        "base": str(config.base),
        "output": str(config.output),
        "device": device,
        "ranks": nproc,
        "lanes_per_rank": lanes,
        "memory_per_rank": buffers + reading,
        "device_memory_per_rank": 0 if device == "cpu" else buffers,
        "combine": str(plan.combine),
        "digest": plan.file_digest,
        "hash_inputs": plan.hash_inputs,
        "kinds": kinds,
        "packed_tensors": sum(formats.values()),
        "packed_formats": dict(formats),
        "packed_output": dict(Counter(_form(task.form) for task in plan.tasks if task.form)),
        "simulated": _simulated(plan),
        "adapters": [asdict(adapter) for adapter in plan.adapters],
        "files": [{"name": file.name, "bytes": file.nbytes} for file in plan.files],
        "segments": len(plan.segments),
        "side_files": [file.name for file in plan.side_files],
        "overlaid_files": [file.name for file in plan.side_files if file.source],
        "config_changed": plan.config_json is not None,
        "memory_needed": plan.least_nbytes,
        "memory_left": left.left,
        "memory_limit": left.name,
        "room_needed": room_nbytes,
        "room_free": free_nbytes(config.output.parent),
        "files_needed": files_needed(plan),
        "files_free": free_files(config.output.parent),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def _simulated(plan: Plan) -> dict[str, Any] | None:
    """What a plain base is rounded through, and how many of its tensors; None where none is."""
    found = [task.source.packing for task in plan.tasks if isinstance(task.source.packing, Simulated)]
    if not found:
        return None
    one = found[0]
    return {"kind": one.kind, "blocksize": one.blocksize, "double": one.double, "tensors": len(found)}


def plan_table(facts: dict[str, Any]) -> str:
    """The facts of a plan as aligned lines."""
    rows = [("base", facts["base"])]
    for adapter in facts["adapters"]:
        rows.append(("adapter", f"{adapter['name']}  weight {adapter['weight']:g}, {adapter['num_tensors']} tensors"))
    if facts["combine"] != "sum":
        rows.append(("combine", facts["combine"]))
    for kind in ("merge", "convert", "copy"):
        if found := facts["kinds"].get(kind):
            read, written = gigabytes(found["bytes_read"]), gigabytes(found["bytes_written"])
            rows.append((kind, f"{found['tensors']} tensors, read {read}, write {written}"))
    if facts["packed_tensors"]:
        kinds = " and ".join(sorted(facts["packed_formats"]))
        rows.append(("packed", f"{facts['packed_tensors']} tensors are dequantized from {kinds}"))
    for form, count in facts["packed_output"].items():
        rows.append(("pack", f"{count} tensors into {form}"))
    if simulated := facts["simulated"]:
        double = "with" if simulated["double"] else "without"
        form = f"{simulated['kind'].upper()} in blocks of {simulated['blocksize']}, {double} double quantization"
        rows.append(("rounded", f"{simulated['tensors']} tensors go through {form} first"))
    rows.append(("output", f"{facts['output']}  {_shards(facts['files'])}, {len(facts['side_files'])} side files"))
    if facts["overlaid_files"]:
        rows.append(("overlaid", f"from the adapter: {', '.join(facts['overlaid_files'])}"))
    if facts["config_changed"]:
        rows.append(("config", "config.json is made true to the weights"))
    also = "; SHA-256 of every file of base and adapters" * facts["hash_inputs"]
    rows.append(("digest", _DIGESTS[facts["digest"]] + also))
    rows.append(("device", f"{facts['device']}, {facts['ranks']} ranks, {facts['lanes_per_rank']} lanes each"))
    memory = f"{gigabytes(facts['memory_per_rank'])} of buffers for each rank, beside what torch takes"
    if facts["device_memory_per_rank"]:
        memory += f", {gigabytes(facts['device_memory_per_rank'])} on its device"
    rows.append(("memory", memory))
    rows.append(("room", f"{gigabytes(facts['room_needed'])} needed, {gigabytes(facts['room_free'])} free"))
    lines = [f"{label:<9}{text}" for label, text in rows]
    lines += [f"{'note':<9}{note}" for note in facts["notes"]]
    lines += [f"{'warning':<9}{warning}" for warning in facts["warnings"]]
    lines += [f"{'warning':<9}{shortage}" for shortage in _shortages(facts)]
    return "\n".join(lines)


def _shortages(facts: dict[str, Any]) -> list[str]:
    """What the machine has too little of."""
    found = []
    if facts["room_free"] < facts["room_needed"]:
        found.append(f"the output does not fit in {os.path.dirname(facts['output']) or '.'}")
    if (free := facts["files_free"]) is not None and free < facts["files_needed"]:
        found.append(f"the output needs {facts['files_needed']} files, there is room for {free} (inodes)")
    if facts["memory_left"] < facts["memory_needed"]:
        needed, left = gigabytes(facts["memory_needed"]), gigabytes(facts["memory_left"])
        found.append(f"a rank needs {needed} of memory here, {facts['memory_limit']} leaves {left}")
    return found


def _form(form: PackedForm) -> str:
    scales = "fitted scales" if form.fitted else "plain scales"
    return f"{form.kind.upper()}, blocks of {form.blocksize}, {scales}{', double quantization' * form.double}"


def _shards(files: list[dict[str, Any]]) -> str:
    total = gigabytes(sum(file["bytes"] for file in files))
    return f"{files[0]['name']} of {total}" if len(files) == 1 else f"{len(files)} shards, {total}"
