"""The file of a pickled adapter, read in this process as the process for it does, but for its limits: what is taken
holds plain tensors whose bytes lie in the file."""

from __future__ import annotations

import io
import random
import warnings
import zipfile

import torch

from distmerge.adapter.saved.pickles import _load
from fuzz.law import scratch, taken

warnings.simplefilter("ignore")  # torch warns of every strange protocol


def one(data: bytes) -> bool:
    path = scratch() / "adapter_model.bin"
    path.write_bytes(data)
    try:
        found = taken(lambda: _load(path), where=False)
    except MemoryError:  # the process says so in words
        return False
    if found is None:
        return False
    tensors, _ = found
    assert all(type(name) is str and tensor.layout == torch.strided for name, tensor in tensors.items())
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= 2 * len(data)
    assert all(tensor.contiguous().shape == tensor.shape for tensor in tensors.values())
    return True


def changed(data: bytes, chance: random.Random) -> bytes:
    """`data` with a few bytes of its pickle changed, and the archive around it whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError, OSError):
        return _flipped(data, chance)
    if chance.random() < 0.1:
        return _flipped(data, chance)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, _flipped(member, chance) if name.endswith("data.pkl") else member)
    return made.getvalue()


def _flipped(data: bytes, chance: random.Random) -> bytes:
    made = bytearray(data or b"\x80\x02")
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(made))
        if chance.random() < 0.5:
            made[place] = chance.choice([0, 1, 255, made[place] ^ (1 << chance.randrange(8))])
        else:
            made[place : place + chance.randint(0, 2)] = chance.choice(
                [b"", b"\xff\xff\xff\x7f", b"(", b"]", b"R", b"q\0"]
            )
            made = made or bytearray(b"\x80")
    return bytes(made)
