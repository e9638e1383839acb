"""The safetensors header, byte for byte: strict when reading, fixed when writing.

Format: 8 bytes little-endian N, N bytes of JSON that begin with `{`, then the data, which the tensors cover
without holes or overlaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmerge.errors import InputError, printable, shown
from distmerge.storage.files import open_input, read_exact
from distmerge.storage.strict_json import parse_object

ITEMSIZE = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
FLOATS = ("BF16", "F16", "F32")

MAX_HEADER_NBYTES = 100_000_000  # the library's own limit
MAX_WIDE_NBYTES = 32_000_000  # of a header with characters that make text four times as large in memory
MAX_DIMS = 16
MAX_NAME_LENGTH = 512
MAX_TENSORS = 500_000
METADATA = {"format": "pt"}
_ENTRY = frozenset(("dtype", "shape", "data_offsets"))
_MAX_COUNT = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor's bytes lie: `nbytes` bytes from byte `begin` of `file`, counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of one file: its tensors in the order of their bytes, its bytes, and `unknown` fields of tensors,
    which the format does not have."""

    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    raw: bytes
    unknown: tuple[str, ...]


def read_header(path: Path, file: str | None = None) -> Header:
    """The header of the safetensors file at `path`, each tensor marked with `file` (default: the file's name).

    Raises InputError for a file that is not whole, valid safetensors by the rules above.
    """
    fd = open_input(path)
    try:
        size = os.fstat(fd).st_size
        if size < 10:
            raise InputError(f"is no safetensors file: only {size} bytes", where=str(path), hint="download it again")
        prefix = bytearray(min(size, 64))
        read_exact(fd, memoryview(prefix), 0, path)
        _recognise_strangers(bytes(prefix), path)
        length = int.from_bytes(prefix[:8], "little")
        if length > min(MAX_HEADER_NBYTES, size - 8):
            raise InputError(
                f"header length {length} does not fit the file of {size} bytes",
                where=str(path),
                hint="the file is truncated or no safetensors file; download it again",
            )
        raw = bytearray(length)
        read_exact(fd, memoryview(raw), 8, path)
    finally:
        os.close(fd)
    return parse_header(bytes(raw), size - 8 - length, where=str(path), file=file or path.name)


def parse_header(raw: bytes, data_nbytes: int, *, where: str, file: str) -> Header:
    """The tensors that the header `raw` lists over `data_nbytes` bytes of data. Raises InputError."""
    if not raw.startswith(b"{"):
        raise InputError("the header must begin with '{'", where=where)
    if len(raw) > MAX_WIDE_NBYTES and (b"\\u" in raw or not raw.isascii()):
        raise InputError(f"the header has {len(raw)} bytes, and characters that are not ASCII", where=where)
    entries = parse_object(raw, where)
    if len(entries) > MAX_TENSORS:
        raise InputError(f"lists {len(entries)} tensors, at most {MAX_TENSORS} are read", where=where)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ must map strings to strings", where=where)
    start = 8 + len(raw)
    tensors = [_parse_tensor(name, entry, start, where=where, file=file) for name, entry in entries.items()]
    unknown = sorted({field for entry in entries.values() for field in entry.keys() - _ENTRY})
    if (unknown or b"\\u" in raw) and not _is_strict([metadata, entries if unknown else {}]):
        raise InputError("the header has half a character, or a number that is none", where=where)
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes, tensor.name))
    _check_cover(tensors, start, data_nbytes, where)
    check_names((tensor.name for tensor in tensors), where)
    return Header(
        tensors=tuple(tensors),
        metadata=metadata,
        raw=raw,
        unknown=tuple(unknown),
    )


def check_names(names: Iterable[str], where: str) -> None:
    """Raises InputError if two of `names`, all different, are the same text: in one the accents are characters of
    their own (Unicode NFC)."""
    forms: dict[str, str] = {}
    for name in names:
        if not name.isascii() and (other := forms.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise InputError(
                f"the names {printable(other)!a} and {printable(name)!a} look alike: they differ only in "
                "their Unicode form",
                where=where,
                hint="rename one of the tensors, or remove it",
            )


def build_header(tensors: list[tuple[str, str, tuple[int, ...]]], data_begin: int | None = None) -> bytes:
    """The bytes before the data of a file that holds `tensors` (name, dtype, shape) one after another.

    The JSON is padded with spaces so that the data begins at byte `data_begin`, or at the next multiple of 8 bytes, as
    the library does. Raises ValueError if the JSON is longer than that.
    """
    entries: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    nbytes = -(-len(raw) // 8) * 8 if data_begin is None else data_begin - 8
    if nbytes < len(raw):
        raise ValueError(f"a header of {len(raw)} bytes does not fit {nbytes}")
    return nbytes.to_bytes(8, "little") + raw.ljust(nbytes)


def _recognise_strangers(prefix: bytes, path: Path) -> None:
    if prefix.startswith(b"version https://git-lfs"):
        raise InputError("is a Git LFS pointer, not the weights", where=str(path), hint="git lfs pull, or hf download")
    if prefix.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError("is a web page saved under a weight file's name", where=str(path), hint="download it again")
    if not any(prefix):
        raise InputError("begins with zeros: an unfinished write after a crash", where=str(path))


def _parse_tensor(name: str, entry: Any, start: int, *, where: str, file: str) -> TensorSpec:
    fault = "" if _is_name(name) else "the name is empty, too long or holds control characters"
    if fault := fault or _fault(entry):
        raise InputError(fault, where=f"{where}: tensor {printable(name)!r}")
    begin, end = entry["data_offsets"]
    return TensorSpec(
        name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), file=file, begin=start + begin, nbytes=end - begin
    )


def _is_strict(value: Any) -> bool:
    """True if every reader of JSON takes `value`: no lone surrogates, no NaN."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # UnicodeEncodeError is one
        return False
    return True


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def _fault(entry: Any) -> str:
    """What is wrong with a header's entry; empty if nothing is."""
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
        return "needs dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        return f"dtype {shown(dtype)} is not known"
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not _are_counts(shape):
        return f"shape {shown(shape)} is not a list of at most {MAX_DIMS} sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_counts(offsets):
        return f"data_offsets {shown(offsets)} are not two sizes"
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if offsets[1] - offsets[0] != nbytes:
        return f"shape {shape} of {dtype} needs {nbytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
    return ""


def _are_counts(values: list[Any]) -> bool:
    return {*map(type, values)} <= {int} and (not values or (min(values) >= 0 and max(values) < _MAX_COUNT))


def _check_cover(tensors: list[TensorSpec], start: int, data_nbytes: int, where: str) -> None:
    end = start
    for tensor in tensors:
        if tensor.begin != end:
            what = "a hole" if tensor.begin > end else "an overlap"
            raise InputError(f"{what} in the data before tensor {printable(tensor.name)!r}", where=where)
        end += tensor.nbytes
    if end != start + data_nbytes:
        raise InputError(
            f"the header promises {end - start} bytes of data, the file has {data_nbytes}",
            where=where,
            hint="a truncated copy? download the file again",
        )
