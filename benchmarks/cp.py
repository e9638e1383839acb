"""(a) What a merge costs against `cp -r` of the same files: by digest, adapter rank, dtype and number of ranks, with a
warm page cache and a cold one.

Files are copied and merged within one round, so that both see the same disk. `stream` is what the ranks do after the
plan until the last block is written, `ranks` the same until digests are there and files are durable, `whole` the
process with its start, `durable` the same with everything on disk; `cp -r` returns with its bytes in the page cache, so
its `whole` is without the disk, and `ranks` is held against its `durable`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Bench, arguments, bench, compared_digests, digest_options, known_digests, titled
from benchmarks.models import make_adapter, make_base

RANKS = (8, 16, 64, 256)
DTYPES = ("float16", "float32")
_MEASURES = {"stream": "whole", "ranks": "durable", "whole": "whole", "durable": "durable"}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nproc", type=int, default=2, help="ranks, where they are not the question")
    with bench(parser, argv) as run:
        base = make_base(run.folder / "base", nbytes=run.options.nbytes)
        adapters = {r: make_adapter(run.folder / f"r{r}", base, r=r) for r in RANKS}
        _digests(run, base, adapters[16])
        _ranks(run, base, adapters)
        _cold(run, base, adapters[16])
        for folder in (base, *adapters.values()):
            shutil.rmtree(folder)
        for dtype in DTYPES:
            _dtype(run, dtype)


def _digests(run: Bench, base: Path, adapter: Path) -> None:
    if run.wanted("digest"):
        nproc = run.options.nproc
        contestants = {"cp": run.copy(base)}
        for digest in known_digests() or [""]:
            contestants[titled(digest)] = run.merge(base, adapter, *digest_options(digest), nproc=nproc)
        first = compared_digests()[0]
        contestants[f"{titled(first)}, 1 rank"] = run.merge(base, adapter, *digest_options(first), nproc=1)
        run.rounds("digest", contestants)
        run.table("digest", _MEASURES, to="cp")


def _ranks(run: Bench, base: Path, adapters: dict[int, Path]) -> None:
    if run.wanted("r"):
        fast, nproc = digest_options("none"), run.options.nproc
        merges = {f"r {r}": run.merge(base, adapter, *fast, nproc=nproc) for r, adapter in adapters.items()}
        run.rounds("r", {"cp": run.copy(base), **merges})
        run.table("r", _MEASURES, to="cp")


def _cold(run: Bench, base: Path, adapter: Path) -> None:
    if run.wanted("cold"):
        contestants = {"cp": run.copy(base, cache="cold")}
        for digest in compared_digests():
            options, nproc = digest_options(digest), run.options.nproc
            contestants[titled(digest)] = run.merge(base, adapter, *options, nproc=nproc, cache="cold")
        run.rounds("cold", contestants)
        run.table("cold", _MEASURES, to="cp")


def _dtype(run: Bench, dtype: str) -> None:
    if run.wanted("dtype"):
        base = make_base(run.folder / "base", nbytes=run.options.nbytes, dtype=dtype)
        adapter = make_adapter(run.folder / "adapter", base)
        merge = run.merge(base, adapter, *digest_options("none"), nproc=run.options.nproc)
        run.rounds(dtype, {"cp": run.copy(base), dtype: merge})
        run.table(dtype, _MEASURES, to="cp")
        shutil.rmtree(base)
        shutil.rmtree(adapter)


if __name__ == "__main__":
    main()
