"""`merge_receipt.json` of a base or an output: what is taken is written and read back equal."""

from __future__ import annotations

import random
from pathlib import Path

from distmerge.checkpoint.base import RECEIPT
from distmerge.receipt import VERSION, read_receipt
from fuzz.law import scratch, taken
from fuzz.mutate import mutated


def _read(data: bytes) -> object:
    folder = Path(scratch())
    (folder / RECEIPT).write_bytes(data)
    return taken(lambda: read_receipt(folder))


def one(data: bytes) -> bool:
    receipt = _read(data)
    if receipt is None:
        return False
    assert receipt.version in range(2, VERSION + 1)
    if receipt.version == VERSION:
        assert _read(receipt.to_json()) == receipt
    return True


def changed(data: bytes, chance: random.Random) -> bytes:
    return mutated(data, chance)
