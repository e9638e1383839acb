"""The index of a base beside two fixed shards: what is taken has every tensor where the shards' own headers have it."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

from distmerge.checkpoint.base import INDEX, read_base
from distmerge.checkpoint.header import build_header
from fuzz.law import scratch, taken
from fuzz.mutate import mutated

SHARDS = {
    "model-00001-of-00002.safetensors": [("a.weight", "F32", (2, 3)), ("b.weight", "BF16", (4,))],
    "model-00002-of-00002.safetensors": [("c.weight", "F32", (1,))],
}


@functools.cache
def _folder() -> Path:
    folder = scratch() / "base"
    folder.mkdir()
    for name, tensors in SHARDS.items():
        (folder / name).write_bytes(build_header(tensors) + bytes(32 if len(tensors) > 1 else 4))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def one(data: bytes) -> bool:
    folder = _folder()
    (folder / INDEX).write_bytes(data)
    base = taken(lambda: read_base(folder))
    if base is None:
        return False
    weight_map = json.loads(data)["weight_map"]
    files = {name: file for file, tensors in SHARDS.items() for name, _, _ in tensors}
    named = set(weight_map.values())
    assert weight_map.items() <= files.items()
    assert {name: stored.data.file for name, stored in base.tensors.items()} == {
        name: file for name, file in files.items() if file in named
    }
    lost = base.tensors.keys() - weight_map.keys()
    assert all(any(name in text for text in base.warnings) for name in lost)
    return True


def changed(data: bytes, chance: random.Random) -> bytes:
    return mutated(data, chance)
