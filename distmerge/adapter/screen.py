"""A pass over an adapter's bytes before anything is written: digests, non-finite values, deltas that are zero."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from distmerge.adapter.peft_adapter import WEIGHTS, Adapter
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.errors import InputError, listing, printable
from distmerge.numerics.dtypes import torch_dtype
from distmerge.storage.files import open_input, read_exact, sha256_of

_CHUNK_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMark:
    """What shows that an adapter is the one that was planned with."""

    weights_sha256: str
    config_sha256: str


def screen(adapter: Adapter, *, allow_zero_delta: bool) -> tuple[AdapterMark, tuple[str, ...]]:
    """The digests of the adapter's files, and warnings.

    Reads every tensor once, in chunks of 4 MiB. Raises InputError for a value that is not finite, naming tensor and
    place, and for an adapter whose every delta is zero unless `allow_zero_delta`.
    """
    path = adapter.folder / WEIGHTS
    fd = open_input(path)
    try:
        zero = [
            pair.module
            for pair in adapter.pairs
            if not (_any_nonzero(fd, pair.a, str(path)) & _any_nonzero(fd, pair.b, str(path)))
        ]
    finally:
        os.close(fd)
    if len(zero) == len(adapter.pairs) and not allow_zero_delta:
        raise InputError(
            f"every delta is zero ({listing(zero)}): merging would change nothing",
            where=str(path),
            hint="was it saved before training? --allow-zero-delta merges it all the same",
        )
    warnings = (f"{adapter.folder.name}: {len(zero)} deltas are zero: {listing(zero)}",) if zero else ()
    mark = AdapterMark(weights_sha256=sha256_of(path), config_sha256=sha256_of(adapter.folder / "adapter_config.json"))
    return mark, warnings


def _any_nonzero(fd: int, spec: TensorSpec, where: str) -> bool:
    found = False
    for offset in range(0, spec.nbytes, _CHUNK_NBYTES):
        data = bytearray(min(_CHUNK_NBYTES, spec.nbytes - offset))
        read_exact(fd, memoryview(data), spec.begin + offset, where)
        values = torch.frombuffer(data, dtype=torch_dtype(spec.dtype))
        finite = torch.isfinite(values)
        if not finite.all():
            first = offset // ITEMSIZE[spec.dtype] + int((~finite).nonzero()[0])
            place = [first // spec.shape[1], first % spec.shape[1]]
            value = values[int((~finite).nonzero()[0])].item()
            raise InputError(f"{printable(spec.name)!r} holds {value} at {place}", where=where)
        found = found or bool(values.any())
    return found
