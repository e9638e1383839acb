"""Copies of the base in a training checkpoint, held against the base: it is the right one, and nothing trained is lost.

A training checkpoint holds the frozen base beside the adapter, as floats or packed in 4 bits. Where these are the
base's own values, the base is the one that was trained on; where they are not, either it is another one or the
tensor was trained too and would be lost.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from distmerge.adapter.changes import Replacement
from distmerge.adapter.equal import equal_views
from distmerge.adapter.load import read_view
from distmerge.adapter.naming.names import Found, Names
from distmerge.adapter.peft_adapter import Adapter
from distmerge.adapter.views import View
from distmerge.checkpoint.header import FLOATS, ITEMSIZE, TensorSpec
from distmerge.checkpoint.packing import Stored
from distmerge.errors import InputError, listing, printable
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.nf4 import TABLES
from distmerge.numerics.packing4 import pack
from distmerge.storage.files import open_input, read_exact

# Of each linear layer as many elements are compared; of everything else all.
_SAMPLE_NUMEL = 1 << 18
_CHUNK_NUMEL = 1 << 22
_NARROW = (torch.bfloat16, torch.float16)
_BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096, 32)


def prove_base(adapter: Adapter, names: Names) -> list[str]:
    """What could be shown of the base of `names`, for the user. Raises InputError, naming tensors, where copies differ
    from it."""
    said = []
    for view, shared in adapter.repeats:
        if not equal_views(adapter.folder, view, shared):
            raise InputError(
                f"{printable(view.spec.name)!r} is not what {printable(shared.spec.name)!r} is",
                where=adapter.where,
                hint="PEFT saves the same values under both names",
            )
    if adapter.copies:
        said.append(_prove_copies(adapter, names))
    if adapter.mirrors:
        said.append(_prove_mirrors(adapter, names))
    return said


def is_copy(replacement: Replacement, names: Names, folder: Path) -> bool:
    """True if a whole parameter, stored in `folder`, has the base's own values."""
    found, view = names.place(replacement.path), replacement.view
    stored = _only(found, names) if found is not None else None
    if stored is None or stored.packing is not None or view.size != stored.shape or not view.is_whole:
        return False
    floats = {view.spec.dtype, stored.dtype} <= set(FLOATS)
    return floats and _equal(folder, view, names.base.folder, stored.data, stored.numel)


def _prove_copies(adapter: Adapter, names: Names) -> str:
    wrong, strange, unknown, numel = [], [], [], 0
    for name, view in adapter.copies.items():
        found = names.place(name)
        if found is None:
            strange.append(view.spec.name)
            continue
        stored = _only(found, names)
        if stored is None or stored.dtype not in FLOATS or stored.packing is not None:
            unknown.append(view.spec.name)
            continue
        length = _sample(name, stored)
        alike = view.spec.dtype in (*FLOATS, "F64") and view.size == stored.shape
        if not alike or not _equal(adapter.folder, view, names.base.folder, stored.data, length):
            wrong.append(view.spec.name)
        numel += length
    if len(strange) < len(adapter.copies):
        wrong += strange  # most names are the base's, so that these are of something that it lacks
    if wrong:
        raise InputError(
            f"{len(wrong)} tensors are neither the adapter's nor copies of the base: {listing(wrong)}",
            where=adapter.where,
            hint="either the base is another one, or they were trained and are named in no adapter_config.json",
        )
    if strange:
        return f"its {len(strange)} copies of the base have other names than the base, and were not compared"
    return f"{len(adapter.copies) - len(unknown)} copies of base tensors equal this base ({numel:,} elements compared)"


def _only(found: Found, names: Names) -> Stored | None:
    """The tensor that holds exactly the parameter, in its own order; None where several do, or a part of one."""
    slot = found.slots[0]
    whole = len(found.slots) == 1 and (slot.sizes, slot.order) == (found.part.sizes, found.part.order)
    return names.base.tensors[slot.name] if whole else None


def _sample(name: str, stored: Stored) -> int:
    in_layer = any(part.isdigit() for part in name.split("."))
    return min(stored.numel, _SAMPLE_NUMEL) if in_layer and len(stored.shape) == 2 else stored.numel


def _equal(folder: Path, view: View, base: Path, spec: TensorSpec, numel: int) -> bool:
    flat = View(spec=view.spec, offset=view.offset, size=(view.numel,), stride=(1,))
    for first in range(0, numel, _CHUNK_NUMEL):
        length = min(_CHUNK_NUMEL, numel - first)
        copy = read_view(folder, flat.narrow(0, first, length)).float()
        values = _read_flat(base, spec, first, length)
        # Training may have loaded the base in 16 bits.
        if not any(torch.equal(copy, values.to(dtype).float()) for dtype in (values.dtype, *_NARROW)):
            return False
    return True


def _prove_mirrors(adapter: Adapter, names: Names) -> str:
    kinds = [(name, size) for name in ("nf4", "fp4") for size in _BLOCKSIZES]
    compared, wrong = 0, []
    for name, spec in adapter.mirrors.items():
        found = names.place(name)
        stored = _only(found, names) if found is not None else None
        if stored is None or stored.dtype not in FLOATS:
            wrong.append(spec.name)
            continue
        fitting = [kind for kind in kinds if _mirrors(adapter, spec, names.base.folder, stored, kind)]
        if not fitting:
            wrong.append(spec.name)
            continue
        kinds = fitting  # one checkpoint is packed in one way
        compared += 1
    if wrong:
        raise InputError(
            f"{len(wrong)} packed copies of the base are not what this base gives when it is packed: {listing(wrong)}",
            where=adapter.where,
            hint=f"is {printable(str(names.base.folder))} the base that the adapter was trained on?",
        )
    return f"packing this base in {kinds[0][0].upper()} gives the bytes of its {compared} packed copies"


def _mirrors(adapter: Adapter, spec: TensorSpec, folder: Path, stored: Stored, kind: tuple[str, int]) -> bool:
    """True if the beginning of `stored`, packed, gives the bytes of `spec`; a base that is packed already must have
    the same ones."""
    name, blocksize = kind
    numel = stored.numel if stored.numel <= _SAMPLE_NUMEL else _SAMPLE_NUMEL // blocksize * blocksize
    if numel % 2:
        return False
    packed, known = _packed_bytes(adapter.folder, spec, numel // 2)
    if stored.packing is not None:
        own = _read_flat(folder, stored.data, 0, numel // 2, dtype="U8")
    else:
        own, _ = pack(_read_flat(folder, stored.data, 0, numel), TABLES[name], blocksize=blocksize)
    return len(packed) == len(own) and torch.equal(packed[known], own[known])


def _packed_bytes(folder: Path, spec: TensorSpec, nbytes: int) -> tuple[Tensor, Tensor]:
    """The first packed bytes of a mirror, and which of them are sure: bytes that were stored as bfloat16 and upcast to
    float32 have lost what they held where they made a NaN."""
    flat = View(spec=spec, offset=0, size=(spec.numel,), stride=(1,))
    if spec.dtype == "F32":
        words = read_view(folder, flat.narrow(0, 0, min(-(-nbytes // 2), spec.numel)))
        known = ~torch.isnan(words)
        return words.bfloat16().view(torch.uint8)[:nbytes], known.repeat_interleave(2)[:nbytes]
    count = min(-(-nbytes // ITEMSIZE[spec.dtype]), spec.numel)
    data = read_view(folder, flat.narrow(0, 0, count)).view(torch.uint8)[:nbytes]
    return data, torch.ones_like(data, dtype=torch.bool)


def _read_flat(folder: Path, spec: TensorSpec, first: int, numel: int, *, dtype: str | None = None) -> Tensor:
    kind = dtype or spec.dtype
    size = ITEMSIZE[kind]
    data = bytearray(numel * size)
    path = folder / spec.file
    fd = open_input(path)
    try:
        read_exact(fd, memoryview(data), spec.begin + first * size, path)
    finally:
        os.close(fd)
    return torch.frombuffer(data, dtype=torch_dtype(kind))
