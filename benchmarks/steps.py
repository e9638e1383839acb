"""Where the time of a merge goes: seconds for each GB of bfloat16 output, on one core, of every step that a block goes
through, and of other ways to take it, which the log of what did not help quotes.

Blocks are those of the engine, in buffers that are used again; files are in the page cache. `cpu` is the time of the
thread, which neighbours on the machine do not change much, `wall` the time on the clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import Bench, Sample, arguments, bench
from distmerge.layout import BLOCK_NUMEL, MEASURED_NUMEL
from distmerge.numerics.compiled import arithmetic, merge_block, unpack_codes
from distmerge.numerics.lora import Factors, add_delta
from distmerge.numerics.nf4 import NF4, pair_table, scale, unpack
from distmerge.numerics.survival import measure
from distmerge.storage.files import allocate

ROWS, COLS = 5632, 2048  # of a matrix that is done whole
_BLOCK_ROWS = BLOCK_NUMEL // COLS
_BLOCK_NBYTES = 2 * BLOCK_NUMEL
_SLICES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)


class Blocks:
    """One lane's buffers, filled with values that look like weights, and a file of `nbytes` bytes to read."""

    def __init__(self, run: Bench) -> None:
        generator = torch.Generator().manual_seed(0)
        self.count = max(1, round(run.options.nbytes / _BLOCK_NBYTES))
        self.nbytes = self.count * _BLOCK_NBYTES
        self.base = (torch.randn(BLOCK_NUMEL, generator=generator) * 0.02).bfloat16()
        self.work = self.base.float() + 0.001 * torch.randn(BLOCK_NUMEL, generator=generator)
        self.out = self.work.bfloat16()
        self.scratch = (torch.empty(MEASURED_NUMEL), torch.empty(MEASURED_NUMEL))
        self.bytes = memoryview(bytearray(self.out.view(torch.uint8).numpy().tobytes()))
        self.packed = torch.randint(0, 256, (BLOCK_NUMEL // 2,), generator=generator, dtype=torch.uint8)
        self.index = torch.empty(BLOCK_NUMEL // 2, dtype=torch.int32)
        self.absmax, self.table = torch.rand(BLOCK_NUMEL // 64, generator=generator), pair_table(NF4)
        self.path, self.target = run.folder / "source.bin", run.folder / "output" / "target.bin"
        with self.path.open("wb") as file:
            for _ in range(self.count):
                file.write(self.bytes)

    def each(self, work: Callable[[int], object]) -> Sample:
        """`work` on every block of the file, by its offset; seconds for each GB."""
        wall, cpu = time.perf_counter(), time.thread_time()
        for number in range(self.count):
            work(number * _BLOCK_NBYTES)
        return self.sample(time.perf_counter() - wall, time.thread_time() - cpu)

    def sample(self, wall: float, cpu: float) -> Sample:
        return {"wall": wall / self.nbytes * 1e9, "cpu": cpu / self.nbytes * 1e9}

    @contextlib.contextmanager
    def open_target(self) -> Iterator[int]:
        """A new file of full length, as the engine opens its own."""
        self.target.parent.mkdir()
        fd = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            allocate(fd, self.nbytes, self.target)
            yield fd
        finally:
            os.close(fd)


def main(argv: list[str] | None = None) -> None:
    with bench(arguments(__doc__, nbytes=1e9), argv) as run:
        torch.set_num_threads(1)
        blocks = Blocks(run)
        sections: dict[str, dict[str, Callable[[], Sample]]] = {
            "steps": _steps(blocks),
            "write": {f"{size >> 10} KiB slices": partial(_write, blocks, size) for size in _SLICES},
            "read": {"pread": partial(_read, blocks), "mmap": partial(_mapped, blocks)},
            "product": {
                "blocks, 1 thread": partial(_lanes, blocks, 1),
                "blocks, 2 lanes, 1 thread each": partial(_lanes, blocks, 2),
                "blocks, 2 lanes, 2 threads each": partial(_lanes, blocks, 2, threads=2),
                "whole tensors, new memory": partial(_whole, blocks),
            },
        }
        for section, contestants in sections.items():
            if run.wanted(section):
                run.rounds(section, contestants)
                run.table(section, {"cpu": "cpu", "wall": "wall"}, to=next(iter(contestants)))


def _steps(blocks: Blocks) -> dict[str, Callable[[], Sample]]:
    steps: dict[str, Callable[[], Sample]] = {
        "read": partial(_read, blocks),
        "unpack NF4": lambda: blocks.each(partial(_unpack, blocks)),
        "to float32": lambda: blocks.each(lambda _: blocks.work.copy_(blocks.base)),
    }
    for r in (16, 64, 256):
        steps[f"add the product, r {r}"] = partial(_product, blocks, r)
    steps |= {
        "round to bfloat16": lambda: blocks.each(lambda _: blocks.out.copy_(blocks.work)),
        "measure what is left": lambda: blocks.each(partial(_survival, blocks)),
    }
    if arithmetic("cpu") == "compiled":
        steps["unpack NF4 at once"] = lambda: blocks.each(partial(_unpack_at_once, blocks))
        for r in (16, 64, 256):
            steps[f"merge at once, r {r}"] = partial(_at_once, blocks, r)
    steps |= {
        "write": partial(_write, blocks, 1 << 18),
        "sync": partial(_write, blocks, 1 << 18, sync=True),
        "crc32": lambda: blocks.each(lambda _: zlib.crc32(blocks.bytes)),
        "sha256": lambda: blocks.each(lambda _: hashlib.sha256(blocks.bytes)),
    }
    with contextlib.suppress(ImportError):
        from isal import isal_zlib

        steps["crc32, with isal"] = lambda: blocks.each(lambda _: isal_zlib.crc32(blocks.bytes))
    with contextlib.suppress(ImportError):
        from xxhash import xxh3_128_digest

        steps["xxh3"] = lambda: blocks.each(lambda _: xxh3_128_digest(blocks.bytes))
    return steps


def _read(blocks: Blocks) -> Sample:
    with blocks.path.open("rb", buffering=0) as file:
        return blocks.each(lambda offset: os.preadv(file.fileno(), [blocks.bytes], offset))


def _mapped(blocks: Blocks) -> Sample:
    """The file mapped, and each block copied from where it lies."""
    with blocks.path.open("rb") as file:
        # Closed by whoever looks last: torch still does when this ends.
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.bfloat16)
    return blocks.each(lambda offset: blocks.out.copy_(whole[offset // 2 :][:BLOCK_NUMEL]))


def _write(blocks: Blocks, size: int, *, sync: bool = False) -> Sample:
    """Every block written in slices of `size` bytes; with `sync` the time of fsync after it instead."""
    with blocks.open_target() as fd:

        def write(offset: int) -> None:
            for start in range(0, _BLOCK_NBYTES, size):
                os.pwrite(fd, blocks.bytes[start : start + size], offset + start)

        sample = blocks.each(write)
        if not sync:
            return sample
        wall, cpu = time.perf_counter(), time.thread_time()
        os.fsync(fd)
        return blocks.sample(time.perf_counter() - wall, time.thread_time() - cpu)


def _unpack(blocks: Blocks, _: int) -> None:
    unpack(blocks.packed, blocks.table, blocks.index, blocks.work)
    scale(blocks.work, blocks.absmax, first=0, blocksize=64)


def _unpack_at_once(blocks: Blocks, _: int) -> None:
    unpack_codes(blocks.packed, blocks.table, blocks.absmax, blocks.out, first=0, blocksize=64)


def _survival(blocks: Blocks, _: int) -> None:
    measure(blocks.base, blocks.work, blocks.out, blocks.scratch)


def _product(blocks: Blocks, r: int) -> Sample:
    factors, rows = _factors(r), blocks.work.view(_BLOCK_ROWS, COLS)
    return blocks.each(lambda _: add_delta(rows, factors, 0, rows=slice(0, _BLOCK_ROWS), cols=slice(0, COLS)))


def _at_once(blocks: Blocks, r: int) -> Sample:
    factors = _factors(r).laid_out()
    base, out = blocks.base.view(_BLOCK_ROWS, COLS), blocks.out.view(_BLOCK_ROWS, COLS)
    product = factors.product(0, rows=slice(0, _BLOCK_ROWS), cols=slice(0, COLS))
    assert product is not None
    return blocks.each(lambda _: merge_block(base, product, out))


def _lanes(blocks: Blocks, lanes: int, *, threads: int = 1) -> Sample:
    """To float32, product, and back, by threads that share the blocks, torch's own `threads` in each; the wall time."""
    factors = _factors(16)

    def lane() -> None:
        torch.set_num_threads(threads)
        work, out = torch.empty(BLOCK_NUMEL), torch.empty(BLOCK_NUMEL, dtype=torch.bfloat16)
        for _ in range(blocks.count // lanes):
            work.copy_(blocks.base)
            add_delta(work.view(_BLOCK_ROWS, COLS), factors, 0, rows=slice(0, _BLOCK_ROWS), cols=slice(0, COLS))
            out.copy_(work)

    workers = [threading.Thread(target=lane) for _ in range(lanes)]
    wall, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sample = blocks.sample(time.perf_counter() - wall, time.process_time() - cpu)
    torch.set_num_threads(1)
    return sample


def _whole(blocks: Blocks) -> Sample:
    """The same for whole tensors, as it is written: new memory for every step."""
    factors = _factors(16)
    weight = blocks.base.repeat(-(-ROWS * COLS // BLOCK_NUMEL))[: ROWS * COLS].view(ROWS, COLS)
    b: Tensor = factors.b[0].repeat(-(-ROWS // len(factors.b[0])), 1)[:ROWS]
    wall, cpu = time.perf_counter(), time.thread_time()
    count = max(1, round(blocks.nbytes / weight.nbytes))
    for _ in range(count):
        (weight.float() + 2.0 * (b @ factors.a[0])).bfloat16()
    done = count * weight.nbytes / 1e9
    return {"wall": (time.perf_counter() - wall) / done, "cpu": (time.thread_time() - cpu) / done}


def _factors(r: int) -> Factors:
    generator = torch.Generator().manual_seed(r)
    a, b = torch.randn(1, r, COLS, generator=generator), torch.randn(1, _BLOCK_ROWS, r, generator=generator)
    return Factors(a=a, b=b, scaling=1e-5)


if __name__ == "__main__":
    main()
