"""A bitsandbytes quantization state beside tensors that the first bytes choose: what is taken agrees with itself by
arithmetic written here once more."""

from __future__ import annotations

import json
import math
import random

from distmerge.checkpoint.four_bit import find_four_bit
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from fuzz.law import taken
from fuzz.mutate import mutated

W = "model.layers.0.self_attn.q_proj.weight"
# What each of the first bytes changes: (tensor, its usual dtype and shape, others).
TENSORS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    (W, "U8", (2048, 1)),
    (f"{W}.absmax", "U8", (64,)),
    (f"{W}.quant_map", "F32", (16,)),
    (f"{W}.nested_absmax", "F32", (1,)),
    (f"{W}.nested_quant_map", "F32", (256,)),
)
DTYPES = ("U8", "F32", "BF16", "F16", "I8")
HEAD = len(TENSORS)


def one(data: bytes) -> bool:
    head, blob = data[:HEAD].ljust(HEAD, b"\0"), data[HEAD:]
    specs = {}
    for choice, (name, dtype, shape) in zip(head, TENSORS, strict=True):
        if choice == 255:  # not there
            continue
        kind = dtype if choice < 128 else DTYPES[choice % len(DTYPES)]
        size = (shape, (shape[0] + choice, *shape[1:]), (choice,), (choice // 2, 2))[choice % 4]
        specs[name] = _spec(name, kind, size)
    state = _spec(f"{W}.quant_state.bitsandbytes__nf4", "U8", (len(blob),))
    specs[state.name] = state
    found = taken(lambda: find_four_bit(specs, lambda _: blob, lambda _: False))
    if found is None:
        return False
    told = json.loads(blob)
    packing, numel = found[W], math.prod(told["shape"])
    assert packing.shape == tuple(told["shape"])
    assert 0 <= specs[W].nbytes - (numel + 1) // 2 < 8
    blocks = math.ceil(numel / told["blocksize"])
    assert math.prod(specs[f"{W}.absmax"].shape) == blocks
    if "nested_blocksize" in told:
        assert specs[f"{W}.nested_absmax"].shape == (math.ceil(blocks / told["nested_blocksize"]),)
        assert specs[f"{W}.nested_quant_map"].nbytes == 1024
    assert specs[f"{W}.quant_map"].nbytes == 64
    return True


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    return TensorSpec(name=name, dtype=dtype, shape=shape, file="model.safetensors", begin=0, nbytes=nbytes)


def changed(data: bytes, chance: random.Random) -> bytes:
    head = bytearray(data[:HEAD].ljust(HEAD, b"\0"))
    if chance.random() < 0.3:
        head[chance.randrange(HEAD)] = chance.choice([0, 0, 1, 2, 3, 64, 128, 200, 255])
    return bytes(head) + mutated(data[HEAD:], chance)
