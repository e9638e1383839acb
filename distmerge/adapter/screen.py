"""A pass over an adapter's bytes before anything is written: digests, non-finite values, deltas that are zero."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distmerge.adapter.naming.names import Names
from distmerge.adapter.peft_adapter import Adapter
from distmerge.adapter.proof import prove_base
from distmerge.adapter.saved.training import config_path
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.errors import InputError, listing, printable
from distmerge.numerics.dtypes import torch_dtype
from distmerge.storage.files import open_input, read_exact, sha256_of

_CHUNK_NBYTES = 4 << 20
# Factors that are zero until training has moved them: a module where they all are is as it was.
_ZERO_AT_START = (
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
    *("lora_A", "lora_B", "lora_E", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),  # AdaLoRA, LoHa
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "vera_lambda_b", "vera_lambda_d"),
    *("pvera_lambda_b", "hira_A", "hira_B", "delora_A", "delora_B", "delora_lambda", "c3a_kernel", "oft_R.weight"),
    *("miss_block", "bone_block", "shira_weight", "fourierft_spectrum", "waveft_spectrum", "beft_bias"),
    *("randlora_lambda", "randlora_gamma", "unilora_scales_A", "unilora_scales_B", "peanut_B.weight"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMark:
    """What shows that an adapter is the one that was planned with."""

    weights_sha256: str
    config_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """An adapter's mark, what could be shown of its base, and what is worth a look."""

    mark: AdapterMark
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def screen(adapter: Adapter, names: Names, used: Sequence[TensorSpec], *, allow_zero_delta: bool) -> Screened:
    """What reading the adapter's bytes shows; `used` are the tensors to hash where the files hold the base too, else
    none.

    Reads every tensor once, in chunks of 4 MiB. Raises InputError for a value that is not finite, naming tensor and
    place, for an adapter whose every delta is zero unless `allow_zero_delta`, and for one that holds copies of another
    base than that of `names`.
    """
    nonzero = _nonzero(adapter)
    zero = [
        module
        for module, roles in adapter.modules.items()
        if any(role in _ZERO_AT_START and view.spec.name not in nonzero for role, view in roles.items())
    ]
    if zero and len(zero) == len(adapter.modules) and not adapter.full and not allow_zero_delta:
        raise InputError(
            f"every delta is zero ({listing(zero)}): merging would change nothing",
            where=adapter.where,
            hint="was it saved before training? --allow-zero-delta merges it all the same",
        )
    warnings = [f"{adapter.folder.name}: {len(zero)} deltas are zero: {listing(zero)}"] * bool(zero)
    config = config_path(adapter.folder)
    return Screened(
        mark=AdapterMark(
            weights_sha256=weights_digest(adapter.folder, adapter.files, used),
            config_sha256=sha256_of(config) if config is not None else "",
        ),
        notes=(*([f"its names were found by {names.how}"] if names.how else []), *prove_base(adapter, names)),
        warnings=tuple(warnings),
    )


def weights_digest(folder: Path, files: tuple[str, ...], used: Sequence[TensorSpec]) -> str:
    """The SHA-256 of the one weight file, or over those of several, each with its name; with `used` over the names,
    shapes and bytes of these tensors alone."""
    if used:
        return _tensors_digest(folder, used)
    if len(files) == 1:
        return sha256_of(folder / files[0])
    # A pickle that was rewritten lies in a folder of the run's own, whose name is no part of the adapter.
    lines = "".join(f"{sha256_of(folder / name)}  {Path(name).is_absolute() or name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _tensors_digest(folder: Path, used: Sequence[TensorSpec]) -> str:
    digest = hashlib.sha256()
    for spec in used:
        digest.update(f"{spec.name} {spec.dtype} {spec.shape}\n".encode())
        fd = open_input(folder / spec.file)
        try:
            for offset in range(0, spec.nbytes, _CHUNK_NBYTES):
                data = bytearray(min(_CHUNK_NBYTES, spec.nbytes - offset))
                read_exact(fd, memoryview(data), spec.begin + offset, spec.file)
                digest.update(data)
        finally:
            os.close(fd)
    return digest.hexdigest()


def _nonzero(adapter: Adapter) -> set[str]:
    """The tensors that are merged and not zero everywhere, by their names in the file."""
    specs = {view.spec.name: view.spec for view in adapter.views if view.spec.numel}
    by_file: dict[str, list[TensorSpec]] = {file: [] for file in adapter.files}
    for spec in sorted(specs.values(), key=lambda spec: spec.begin):
        by_file[spec.file].append(spec)
    found: set[str] = set()
    for file, inside in by_file.items():
        where = str(adapter.folder / adapter.pickles.get(file, file))
        fd = open_input(adapter.folder / file)
        try:
            for run in _runs(inside):
                found |= _nonzero_of(fd, run, where)
        finally:
            os.close(fd)
    return found


def _runs(specs: Iterable[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Tensors of one dtype that lie side by side, as many as a chunk holds, or one that is larger."""
    run: list[TensorSpec] = []
    for spec in specs:
        first, last = (run[0], run[-1]) if run else (spec, spec)
        beside = last.begin + last.nbytes == spec.begin and last.dtype == spec.dtype
        if run and not (beside and spec.begin + spec.nbytes - first.begin <= _CHUNK_NBYTES):
            yield run
            run = []
        run.append(spec)
    if run:
        yield run


def _nonzero_of(fd: int, run: list[TensorSpec], where: str) -> set[str]:
    """The names of those of `run` that are not zero everywhere. Raises InputError for a value that is not finite."""
    nbytes = run[-1].begin + run[-1].nbytes - run[0].begin
    if len(run) == 1 or nbytes > _CHUNK_NBYTES:
        return {spec.name for spec in run if _any_nonzero(fd, spec, where)}
    data = bytearray(nbytes)
    read_exact(fd, memoryview(data), run[0].begin, where)
    values = torch.frombuffer(data, dtype=torch_dtype(run[0].dtype))
    size = ITEMSIZE[run[0].dtype]
    places = [((spec.begin - run[0].begin) // size, spec.numel) for spec in run]
    # A sum shows every value that is not finite; one that overflows only sends us to look at each tensor.
    if not torch.isfinite(values.sum(dtype=torch.float32)):
        return {spec.name for spec in run if _any_nonzero(fd, spec, where)}
    firsts = values[torch.tensor([place for place, _ in places])].tolist()
    return {
        spec.name
        for spec, first, (place, numel) in zip(run, firsts, places, strict=True)
        if first or bool(values[place : place + numel].any())
    }


def _any_nonzero(fd: int, spec: TensorSpec, where: str) -> bool:
    found = False
    for offset in range(0, spec.nbytes, _CHUNK_NBYTES):
        data = bytearray(min(_CHUNK_NBYTES, spec.nbytes - offset))
        read_exact(fd, memoryview(data), spec.begin + offset, where)
        values = torch.frombuffer(data, dtype=torch_dtype(spec.dtype))
        finite = torch.isfinite(values)
        if not finite.all():
            first = offset // ITEMSIZE[spec.dtype] + int((~finite).nonzero()[0])
            place = [int(index) for index in torch.unravel_index(torch.tensor(first), spec.shape)]
            value = values[int((~finite).nonzero()[0])].item()
            raise InputError(f"{printable(spec.name)!r} holds {value} at {place}", where=where)
        found = found or bool(values.any())
    return found
