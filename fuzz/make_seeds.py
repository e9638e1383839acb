"""Writes the seeds of every target into its corpus: one file for each thing that a reader has to tell apart."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.checkpoint.header import build_header
from distmerge.journal import ShardRecord
from distmerge.manifest import Manifest
from distmerge.storage.records import encode
from distmerge.stream import PieceRecord, SegmentRecord
from fuzz.law import CORPUS
from fuzz.scenes import write_scene
from fuzz.targets import index
from fuzz.targets.quant_state import HEAD


def _write(target: str, seeds: dict[str, bytes | dict[str, Any]]) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in seeds.items():
        data = seed if isinstance(seed, bytes) else json.dumps(seed, separators=(",", ":")).encode()
        (folder / f"seed-{name}").write_bytes(data)


def _headers() -> dict[str, bytes | dict[str, Any]]:
    several = [
        ("b", "F64", (2,)),
        ("a.weight", "F32", (2, 3)),
        ("c", "BF16", (1, 1, 4)),
        ("d", "U8", ()),
        ("e", "I8", (0, 7)),
    ]
    null = b'{"__metadata__":null,"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'
    return {
        "one": build_header([("a", "F32", (2, 2))]) + bytes(16),
        "several": build_header(several) + bytes(16 + 24 + 8 + 1),
        "none": build_header([]),
        "metadata": len(null).to_bytes(8, "little") + null + bytes(2),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    }


def _configs() -> dict[str, bytes | dict[str, Any]]:
    lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {".*down.*": 3, "layers.11.mlp.down_proj": 5}}
    layers = {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}
    words = {
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": ["lm_head"],
        "fan_in_fan_out": False,
    }
    others = {
        "exclude_modules": "lm_head",
        "init_lora_weights": "pissa",
        "layer_replication": [[0, 1]],
        "loftq_config": {},
    }
    return {
        "lora": lora,
        "patterns": {**lora, **patterns, "target_modules": ".*_proj"},
        "layers": {**lora, **layers, "base_model_name_or_path": "org/base", "peft_version": "0.21.2"},
        "words": {**lora, **words, "task_type": "CAUSAL_LM", "revision": None},
        "others": {**lora, **others, "target_parameters": ["mlp.experts"], "trainable_token_indices": [1]},
        "ia3": {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []},
    }


def _states() -> dict[str, bytes | dict[str, Any]]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    nested = {**state, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    return {
        "nested": bytes(HEAD) + json.dumps(nested).encode(),
        "plain": bytes([0, 192, 0, 255, 255]) + json.dumps(state).encode(),  # absmax in floats
    }


def _pickles(folder: Path) -> dict[str, bytes | dict[str, Any]]:
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)[::1]}
    values = {"plain": tensors, "wrapped": {"state_dict": tensors, "epoch": 3}, "list": [torch.ones(1)]}
    found: dict[str, bytes | dict[str, Any]] = {}
    for name, value in values.items():
        for archive in (True, False):
            torch.save(value, folder / "p", _use_new_zipfile_serialization=archive)
            found[f"{name}-{'zip' if archive else 'old'}"] = (folder / "p").read_bytes()
    return found


def _runs(folder: Path) -> None:
    """What a small merge leaves: its receipt, its manifest, its journal."""
    base, adapter = write_scene(folder)
    choices = (AdapterChoice(folder=adapter),)
    config = MergeConfig(base=base, adapters=choices, output=folder / "out", device="cpu", hash_inputs=True)
    plan = distmerge.plan(config)
    distmerge.merge(config)
    _write("receipt", {"merge": (folder / "out" / "merge_receipt.json").read_bytes()})
    _write("manifest", {"merge": Manifest.of(plan).data})
    lines = []
    for number, segment in enumerate(plan.segments):
        pieces = []
        for piece in segment.pieces:
            task = plan.tasks[piece.task]
            numel, applied = task.numel_of(piece.first, piece.last), task.applied_of(piece.first, piece.last)
            norms = (1.0,) * len(applied)
            pieces.append(
                PieceRecord(
                    task=piece.task,
                    numel=numel,
                    changed=applied,
                    delta_squared=norms,
                    sums=None,
                    singular=norms,
                    not_finite=0,
                )
            )
        lines.append({"plan": "PLAN", "segment": SegmentRecord(segment=number, crc32=number, pieces=tuple(pieces))})
    for number, file in enumerate(plan.files):
        crcs = tuple(plan.segments_of(number))
        lines.append(
            {
                "plan": "PLAN",
                "shard": ShardRecord(file=number, nbytes=file.nbytes, digest="0" * 64, segment_crc32s=crcs),
            }
        )
    _write("journal", {"merge": "\n".join(map(encode, lines)).encode(), "none": b"{}"})


def main() -> None:
    chance = random.Random(0)
    weight_map = {name: file for file, tensors in index.SHARDS.items() for name, _, _ in tensors}
    recipe = {
        "base": "b",
        "adapter": ["x", "y"],
        "weight": [1.0, 0.5],
        "output": "out",
        "max-shard-size": "5GB",
        "nproc": 2,
    }
    _write("header", _headers())
    _write("index", {"whole": {"metadata": {"total_size": 36}, "weight_map": weight_map}, "none": {"weight_map": {}}})
    _write("adapter_config", _configs())
    _write("quant_state", _states())
    _write("recipe", {"whole": yaml.safe_dump(recipe).encode(), "anchors": b"base: &a x\noutput: *a\nadapter: [*a]\n"})
    _write("plan", {f"noise-{n}": chance.randbytes(400) for n in range(4)})
    with tempfile.TemporaryDirectory() as folder:
        _write("pickle", _pickles(Path(folder)))
        _runs(Path(folder) / "run")


if __name__ == "__main__":
    main()
