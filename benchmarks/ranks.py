"""(d) One rank against two, on models in 1, 4 and 16 files, at r 16 and 256.

A rank has a lane for each core, so one rank alone keeps all of them busy, and a second brings little on one machine.
What ranks are worth where computing is the limit shows when each has one core: one rank on one core against two on two
(`1 core` and `2 cores`, one file, r 256).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Bench, arguments, bench, digest_options
from benchmarks.models import make_adapter, make_base

SHARDS = (1, 4, 16)
RANKS = (16, 256)
_MEASURES = {"stream": "stream", "ranks": "ranks", "whole": "whole"}


def main(argv: list[str] | None = None) -> None:
    with bench(arguments(__doc__, nbytes=1.5e9), argv) as run:
        for shards in SHARDS:
            if run.wanted(f"shards{shards}"):
                _shards(run, shards)


def _shards(run: Bench, shards: int) -> None:
    nbytes = run.options.nbytes
    base = make_base(run.folder / "base", nbytes=nbytes, shard_nbytes=1.2 * nbytes / shards if shards > 1 else 1e15)
    files = len(list(base.glob("*.safetensors")))
    for r in RANKS:
        adapter = make_adapter(run.folder / f"r{r}", base, r=r)
        fast = digest_options("none")
        contestants = {f"{n} rank{'s' * (n > 1)}": run.merge(base, adapter, *fast, nproc=n) for n in (1, 2)}
        cores = sorted(os.sched_getaffinity(0))
        if shards == 1 and r == RANKS[-1] and len(cores) > 1:
            for n in (1, 2):
                name = f"{n} rank{'s' * (n > 1)}, {n} core{'s' * (n > 1)}"
                contestants[name] = run.merge(base, adapter, *fast, nproc=n, cpus=set(cores[:n]))
        section = f"{files} file{'s' * (files > 1)}, r {r}"
        run.rounds(section, contestants)
        run.table(section, _MEASURES, to="1 rank")
        if "1 rank, 1 core" in contestants:
            run.table(section, _MEASURES, to="2 ranks, 2 cores")
        shutil.rmtree(adapter)
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
