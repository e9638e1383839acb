"""The manifest of an interrupted run, forged: it holds a plan, which comes back equal once it is written, or none."""

from __future__ import annotations

import random
from dataclasses import replace

from distmerge.manifest import Manifest
from fuzz.mutate import mutated


def one(data: bytes) -> bool:
    manifest = Manifest.found(data)
    plan = manifest.plan() if manifest is not None else None
    if manifest is None or plan is None:
        return False
    again = Manifest.found(Manifest.of(replace(plan)).data)
    assert again is not None
    assert again.plan() == plan
    return True


def changed(data: bytes, chance: random.Random) -> bytes:
    return mutated(data, chance)
