"""Weights in a pickle, rewritten as safetensors by a process of its own that can read tensors and nothing else.

`python -m distmerge.adapter.saved.pickles SOURCE TARGET MEMORY_NBYTES SECONDS` is that process. It reads with torch's
weights-only unpickler, which builds tensors and plain containers and calls nothing that the file names; what a hostile
file can still do, take memory, time or disk, is bounded by the limits of the process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge.checkpoint.header import build_header
from distmerge.errors import InputError, printable, shown
from distmerge.redaction import is_secret
from distmerge.storage.files import open_input, replacing, write_exact

if TYPE_CHECKING:
    from torch import Tensor

MEMORY_NBYTES = 4 << 30
SECONDS = 3600.0
_PIECE_NBYTES = 4 << 20
# Names under which trainers put the weights beside counters and optimizer states.
_WEIGHTS = ("state_dict", "model", "module", "adapter")
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
_NAMES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}


def unpickle(path: Path, target: Path, *, memory_nbytes: int = MEMORY_NBYTES, seconds: float = SECONDS) -> list[str]:
    """Writes the tensors of the pickle at `path` to a safetensors file at `target`; returns what is left out, by name.

    The file itself is mapped, not counted as memory. Raises InputError if it holds anything but tensors or needs more.
    """
    os.close(open_input(path))
    package = Path(__file__).parents[3]
    command = [sys.executable, "-P", "-m", "distmerge.adapter.saved.pickles"]
    command += [str(path.absolute()), str(target.absolute()), str(memory_nbytes), str(int(seconds) + 1)]
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as words:
        try:
            done = subprocess.run(  # noqa: S603 - our own module; the file's name is an argument
                command,
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=words,
                timeout=2 * seconds + 60,  # the limit is on CPU time; a slow disk may take longer
                env={**_environment(), "PYTHONPATH": str(package)},
                cwd=target.parent,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _unread(path, f"it takes more than {2 * seconds + 60:.0f} s") from None
        answer.seek(0)
        result = _parse(answer.read(1 << 24))
        words.seek(0)
        last = words.read(1 << 16).decode(errors="replace").strip().rpartition("\n")[2]
    if done.returncode == 0 and isinstance(result.get("left"), list):
        return [printable(str(name)) for name in result["left"]]
    if "error" in result:
        raise InputError(printable(str(result["error"]), 400), where=str(path), hint=_HINT)
    if done.returncode < 0:
        raise _unread(path, f"it takes more than {seconds:.0f} s or {memory_nbytes} bytes (signal {-done.returncode})")
    raise _unread(path, f"the process that read it ended with exit {done.returncode} {printable(last)}".strip())


_HINT = "load it where you trust it and save it as safetensors"


def _unread(path: Path, what: str) -> InputError:
    return InputError(f"is no pickle of weights that can be read: {what}", where=str(path), hint=_HINT)


def _environment() -> dict[str, str]:
    """The environment without what would load more code or reach for a GPU, and without secrets."""
    left_out = ("PYTHON", "TORCH", "DISTMERGE_")
    kept = {n: value for n, value in os.environ.items() if not n.startswith(left_out) and not is_secret(n)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _main(source: str, target: str, memory_nbytes: str, seconds: str) -> None:
    import torch

    torch.set_num_threads(1)
    path = Path(source)
    _limit(memory_nbytes=int(memory_nbytes), file_nbytes=path.stat().st_size, seconds=int(seconds))
    try:
        tensors, left = _load(path)
        _write(tensors, Path(target))
        answer: dict[str, Any] = {"left": left}
    except InputError as error:
        answer = {"error": error.what}
    except (MemoryError, RecursionError) as error:
        answer = {"error": f"is no pickle of weights that can be read: {type(error).__name__}"}
    json.dump(answer, sys.stdout)


def _limit(*, memory_nbytes: int, file_nbytes: int, seconds: int) -> None:
    """What this process may take from now on; torch's own libraries are loaded already."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    # Tied tensors are written once for each name.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * file_nbytes + _PIECE_NBYTES,) * 2)
    statm = Path("/proc/self/statm")
    if statm.exists():
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + file_nbytes + memory_nbytes,) * 2)


def _load(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in the pickle, by name, and the names of what else there is."""
    import torch

    mapped = _is_plain_archive(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # whatever a stranger's bytes make the reader raise says something about them
        raise InputError(_reason(str(error) or type(error).__name__)) from None
    weights, left = _unwrap(value)
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise InputError(f"the name {shown(name)} is no text")
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{shown(name)} is of type {type(tensor).__name__}, not a tensor")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or _dtype(tensor) not in _NAMES:
            raise InputError(f"{shown(name)} is no plain tensor: {type(tensor).__name__}, {tensor.dtype}")
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if nbytes > 2 * path.stat().st_size:
        raise InputError(f"the tensors have {nbytes} bytes in a file of {path.stat().st_size}")
    return weights, left


def _is_plain_archive(path: Path) -> bool:
    """True for torch's own archives, which can be mapped. Raises InputError for a compressed one, which torch never
    writes; older pickles are no archives."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(_reason(str(error))) from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError("is a compressed archive, not what torch.save writes")
    return True


def _reason(message: str) -> str:
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return f"calls {printable(found[1])}, which weights do not need; it may run code"
    found = re.search(r"WeightsUnpickler error: ([^\n]*)", message)
    first = found[1] if found else message.strip().split("\n")[0]
    return (
        f"is no pickle of weights that can be read: {printable(first.strip() or 'its contents are of no known kind')}"
    )


def _unwrap(value: Any) -> tuple[dict[Any, Any], list[str]]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"holds {type(value).__name__}, not tensors by name")
    inner = [name for name in _WEIGHTS if isinstance(value.get(name), dict) and value[name]]
    if len(inner) == 1 and not any(hasattr(entry, "layout") for entry in value.values()):
        return value[inner[0]], sorted(str(name) for name in value if name != inner[0])
    return value, []


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write(tensors: dict[str, Tensor], target: Path) -> None:
    import torch

    # The widest first, so that every tensor begins at a multiple of its element's size.
    rows = sorted(tensors.items(), key=lambda row: (-row[1].element_size(), row[0]))
    header = build_header([(name, _NAMES[_dtype(tensor)], tuple(tensor.shape)) for name, tensor in rows])
    with replacing(target) as fd:
        write_exact(fd, memoryview(header), 0, target)
        offset = len(header)
        for _, tensor in rows:
            if not tensor.numel():
                continue
            values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            data = memoryview(values)
            for start in range(0, len(data), _PIECE_NBYTES):
                write_exact(fd, data[start : start + _PIECE_NBYTES], offset + start, target)
            offset += len(data)


if __name__ == "__main__":
    _main(*sys.argv[1:])
