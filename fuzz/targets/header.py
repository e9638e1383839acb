"""A safetensors file: what is taken, the safetensors library takes too, and finds the same tensors in it."""

from __future__ import annotations

import random

from safetensors import deserialize

from distmerge.checkpoint.header import read_header
from fuzz.law import scratch, taken
from fuzz.mutate import mutated


def one(data: bytes) -> bool:
    path = scratch() / "model.safetensors"
    path.write_bytes(data)
    header = taken(lambda: read_header(path))
    if header is None:
        return False
    ours = {t.name: (t.dtype, list(t.shape), data[t.begin : t.begin + t.nbytes]) for t in header.tensors}
    theirs = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(data)}
    assert ours == theirs, (ours, theirs)
    return True


def changed(data: bytes, chance: random.Random) -> bytes:
    """`data` with another header, its length mostly true and its tail mostly of the length that the header says."""
    length = int.from_bytes(data[:8], "little")
    header = mutated(data[8 : 8 + length], chance)
    tail = data[8 + length :] if length < len(data) else b""
    told = len(header) if chance.random() < 0.95 else chance.choice([0, len(header) + 1, 1 << 63, 100_000_000])
    if chance.random() < 0.1:
        tail = tail[:-1] or b"\x00"
    return told.to_bytes(8, "little") + header + tail
