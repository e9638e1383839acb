"""(c) Cost against the size of the model: seconds should lie on a straight line, memory should not move.

The smaller models are the first files of the largest one, under links, so that each round runs all of them. A model
that fills the page cache together with its output goes at the disk's speed from there on, which bends the line of
`whole`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import arguments, bench, digest_options
from benchmarks.models import make_adapter, make_base, make_part
from benchmarks.tables import size_line

SHARES = (1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, nbytes=12e9, rounds=3)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    with bench(parser, argv) as run:
        nbytes = run.options.nbytes
        base = make_base(run.folder / "base", nbytes=nbytes, shard_nbytes=nbytes / 24)
        files = len(list(base.glob("*.safetensors")))
        contestants, sizes = {}, {}
        for number in sorted({max(1, round(share * files)) for share in SHARES}):
            part = make_part(run.folder / f"part{number}", base, num_files=number)
            size = sum(path.stat().st_size for path in part.glob("*.safetensors"))
            adapter = make_adapter(run.folder / f"adapter{number}", part)
            name = f"{size / 1e9:.3g} GB"
            sizes[name] = size
            contestants[name] = run.merge(part, adapter, *digest_options("none"), nproc=run.options.nproc)
        shutil.rmtree(base)
        run.note("size", sizes=sizes)
        run.rounds("size", contestants)
        first = next(iter(contestants))
        run.table("size", {"whole": "whole", "ranks": "ranks", "process_peak": "process_peak"}, to=first)
        for measure in ("whole", "ranks", "process_peak"):
            line = size_line(run.log, measure)
            print(f"\n{measure}: {line.start:.3g} + {line.slope:.3g} for each GB, R2 {line.r2:.4f}")


if __name__ == "__main__":
    main()
