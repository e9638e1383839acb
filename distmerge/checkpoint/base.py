"""The base: its files found, its headers read, its tensors named, before any tensor data is touched."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmerge.checkpoint.formats import group
from distmerge.checkpoint.header import TensorSpec, check_names, read_header
from distmerge.checkpoint.packing import Stored
from distmerge.checkpoint.quantization import Quantization, read_quantization
from distmerge.errors import InputError, MachineError, listing, printable, shown
from distmerge.storage.files import read_range
from distmerge.storage.strict_json import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECEIPT = "merge_receipt.json"  # of an output of distmerge


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMark:
    """What shows that a weight file is the one that was planned with, without reading its data."""

    name: str
    nbytes: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A checkpoint folder: stored tensors by name in the order of their bytes, shards in the order of their names."""

    folder: Path
    files: tuple[FileMark, ...]
    tensors: dict[str, Stored]
    config: dict[str, Any]
    quantization: Quantization | None
    warnings: tuple[str, ...]

    @property
    def packed(self) -> bool:
        return any(stored.packing for stored in self.tensors.values())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The formats of its packed tensors, by name."""
        return tuple(sorted({stored.packing.kind for stored in self.tensors.values() if stored.packing}))


def read_base(folder: Path) -> Base:
    """The checkpoint in `folder`, from headers and small files. Raises InputError for what cannot be merged."""
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), hint=_no_folder(folder))
    shards, index = _find_shards(folder)
    warnings: list[str] = []
    marks: list[FileMark] = []
    specs: dict[str, TensorSpec] = {}
    for shard in shards:
        path = folder / shard
        header = read_header(path, shard)
        status = path.stat()
        digest = hashlib.sha256(header.raw).hexdigest()
        marks.append(FileMark(name=shard, nbytes=status.st_size, mtime_ns=status.st_mtime_ns, header_sha256=digest))
        for spec in header.tensors:
            if spec.name in specs:
                raise InputError(f"in two files: {specs[spec.name].file} and {shard}", where=printable(spec.name))
            specs[spec.name] = spec
        if header.unknown:
            warnings.append(
                f"{shard} describes tensors by fields that the format does not have: {listing([*header.unknown])}"
            )
    check_names(specs, str(folder))
    if index is not None:
        warnings += _check_index(folder, index, specs)
    if not specs:
        raise InputError("holds no tensors", where=str(folder))
    config = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    if not config:
        warnings.append("config.json is missing or empty: nothing but the tensors tells what model this is")
    quantization = read_quantization(folder, config)
    tensors = group(specs, lambda spec: read_range(folder / spec.file, spec.begin, spec.nbytes), quantization, config)
    return Base(
        folder=folder,
        files=tuple(marks),
        tensors=tensors,
        config=config,
        quantization=quantization,
        warnings=tuple(warnings),
    )


def check_mark(path: Path, mark: FileMark) -> None:
    """Raises MachineError if the file at `path` is not the one that was planned with, by its length and header. Its
    time does not count: copies on other nodes have their own."""
    try:
        header = read_header(path)
        same = path.stat().st_size == mark.nbytes and hashlib.sha256(header.raw).hexdigest() == mark.header_sha256
        what = "is not the file that the merge was planned with"
    except InputError as error:
        same, what = False, f"is no longer the file that the merge was planned with: {error.what}"
    if not same:
        raise MachineError(
            what,
            where=str(path),
            hint="every rank must see the same base, and nothing may change it while it is read",
        )


def folder_name(folder: Path) -> str:
    """What people call `folder`: its own name, or the model's for a snapshot in a Hugging Face cache."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return printable(repository.split("--")[-1])
    return printable(folder.name)


def _find_shards(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The base's weight files, and its index if that names them."""
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    weight_map = read_object(folder / INDEX).get("weight_map") if single and index else None
    only_single = isinstance(weight_map, dict) and all(file == SINGLE for file in weight_map.values())
    if single and index and not only_single:
        raise InputError(
            f"both {SINGLE} and {INDEX} are there, and loaders disagree on which one counts",
            where=str(folder),
            hint="move the stale one away",
        )
    if single:
        return [SINGLE], None
    if index:
        values = read_object(folder / INDEX)
        return shards_of_index(folder, values.get("weight_map"), str(folder / INDEX)), values
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf", ".pt"))
    hint = "save the model as safetensors first (save_pretrained)" if found else "is this the folder of a checkpoint?"
    raise InputError(
        f"neither {SINGLE} nor {INDEX} is there" + (f"; found {listing(found)}" if found else ""),
        where=str(folder),
        hint=hint,
    )


def shards_of_index(folder: Path, weight_map: Any, where: str, *, suffix: str = ".safetensors") -> list[str]:
    """The files that an index's `weight_map` names, in the order of their names. Raises InputError, naming them, for
    files that are not there or not plain names of the folder that end in `suffix`."""
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError("weight_map must map tensor names to file names", where=where)
    if not weight_map:
        raise InputError("weight_map is empty", where=where)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not is_plain_name(shard) or not shard.endswith(suffix):
            raise InputError(
                f"shard {printable(shard)!r} is not a plain {suffix} file name",
                where=where,
                hint="an index may only name files of its own folder",
            )
    if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards are missing: {listing(missing)}",
            where=str(folder),
            hint="finish the download, or the copy, of the checkpoint",
        )
    return shards


def is_plain_name(name: str) -> bool:
    """True if `name` is one ordinary path component on any system: no folder, drive, dots or control characters."""
    return (
        name.isprintable()
        and 0 < len(name.encode()) <= 240
        and not re.search(r'[/\\:*?"<>|]', name)
        and not name.startswith(".")
    )


def _no_folder(folder: Path) -> str:
    """What to do where there is no such folder, which may be the name of a repository."""
    name = str(folder)
    if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII) and not name.startswith("."):
        return f"is it a repository? `hf download {name} --local-dir {folder.name}`, then --base {folder.name}"
    return "--base takes the folder of a checkpoint"


def _stale(folder: Path, shards: set[str]) -> list[str]:
    """Shards in the folder that its index does not name: those of another download or an earlier save."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if re.fullmatch(r"model-\d+-of-\d+\.safetensors", path.name) and path.name not in shards
    )


def _check_index(folder: Path, index: dict[str, Any], specs: dict[str, TensorSpec]) -> list[str]:
    where, weight_map = str(folder / INDEX), index["weight_map"]
    if lost := [name for name, shard in weight_map.items() if name not in specs or specs[name].file != shard]:
        raise InputError(
            f"{len(lost)} tensors are not in the shard that the index names: {listing(lost)}",
            where=where,
            hint="index and shards are of different checkpoints; download the base again",
        )
    warnings = []
    if orphans := [name for name in specs if name not in weight_map]:
        warnings.append(
            f"{len(orphans)} tensors are in the shards but not in the index, and are kept: {listing(orphans)}"
        )
    if stale := _stale(folder, set(weight_map.values())):
        warnings.append(f"{len(stale)} shards are not in the index, and are left out: {listing(stale)}")
    metadata, nbytes = index.get("metadata"), sum(spec.nbytes for spec in specs.values())
    told = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not orphans and told not in (None, nbytes):
        warnings.append(f"the index says {shown(told)} bytes of tensors, the shards hold {nbytes}")
    return warnings
