"""(f) The product B A as the engine adds it, in blocks that stay in a core's cache, against a plain float32 matrix
product of the same shapes: GFLOP/s, on one core and on all.

`engine` is `numerics.lora.add_delta` on blocks of layout.BLOCK_NUMEL elements in one reused buffer, a thread for each
core as in the lanes. `product` is one `torch.mm` for the whole tensor into memory that exists already, `fresh` into
new memory, as `B @ A` is written; torch's own threads on all cores. `square` is a product of two 2048 x 2048 matrices:
what the cores can do when memory does not matter.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.harness import Bench, Sample, arguments, bench
from distmerge.layout import BLOCK_NUMEL
from distmerge.numerics.lora import Factors, add_delta

RANKS = (16, 64, 256)
_SQUARE = 2048
_FLOPS_PER_BYTE = 150  # of work for each byte of the product, so that a sample takes a tenth of a second or more


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, nbytes=64e6, rounds=9)
    with bench(parser, argv) as run:
        cores = len(os.sched_getaffinity(0))
        cols = 4096
        rows = max(BLOCK_NUMEL // cols, round(run.options.nbytes / 4 / cols))
        for threads in dict.fromkeys((1, cores)):
            for r in RANKS:
                _measure(run, rows, cols, r, threads)


def _measure(run: Bench, rows: int, cols: int, r: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(r, cols, generator=generator), torch.randn(rows, r, generator=generator)
    out, flops = torch.empty(rows, cols), 2.0 * rows * cols * r
    repeats = max(1, round(_FLOPS_PER_BYTE * run.options.nbytes * threads / flops))
    side = torch.randn(_SQUARE, _SQUARE, generator=generator)
    times = max(1, round(repeats * flops / (2 * _SQUARE**3)))
    square, square_flops = torch.empty_like(side), 2.0 * _SQUARE**3

    def fresh() -> None:
        b @ a

    contestants: dict[str, Callable[[], Sample]] = {
        "engine": partial(_engine, a, b, threads, repeats),
        "product": partial(_torch, partial(torch.mm, b, a, out=out), threads, repeats, flops),
        "fresh": partial(_torch, fresh, threads, repeats, flops),
        "square": partial(_torch, partial(torch.mm, side, side, out=square), threads, times, square_flops),
    }
    section = f"r {r}, {threads} core{'s' * (threads > 1)}"
    run.rounds(section, contestants)
    run.table(section, {"gflops": "gflops"}, to="product")


def _torch(work: Callable[[], object], threads: int, repeats: int, flops: float) -> Sample:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return {"gflops": repeats * flops / (time.perf_counter() - started) / 1e9}


def _engine(a: torch.Tensor, b: torch.Tensor, threads: int, repeats: int) -> Sample:
    """Every block of the product, `repeats` times, spread over threads with a buffer each."""
    torch.set_num_threads(1)
    factors = Factors(a=a[None], b=b[None], scaling=2.0).laid_out()
    (rows, r), cols = b.shape, a.shape[1]
    step = max(1, BLOCK_NUMEL // cols)
    starts = [start for _ in range(repeats) for start in range(0, rows, step)]

    def lane(mine: list[int]) -> None:
        torch.set_num_threads(1)
        work = torch.zeros(step, cols)
        for start in mine:
            stop = min(start + step, rows)
            add_delta(work[: stop - start], factors, 0, rows=slice(start, stop), cols=slice(0, cols))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lane, [[] for _ in range(threads)]))  # threads are there before the clock starts
        started = time.perf_counter()
        list(pool.map(lane, [starts[number::threads] for number in range(threads)]))
        seconds = time.perf_counter() - started
    return {"gflops": 2.0 * rows * cols * r * repeats / seconds / 1e9}


if __name__ == "__main__":
    main()
