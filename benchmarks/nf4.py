"""(g) An NF4 base, packed by bitsandbytes, merged into bfloat16: against writing and syncing that many bytes, and
against transformers' dequantize, PEFT's merge and save_pretrained.

`--nbytes` is the size of the output. `write` puts zeros into new files in slices of 256 KiB, and syncs them: the floor,
since a base of a quarter of the size is read beside it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cache import sync_folder, warm_memory
from benchmarks.harness import Bench, Sample, arguments, bench, compared_digests, digest_options, titled
from benchmarks.models import make_adapter, make_base, pack_base
from benchmarks.peers import peer, rank_program

_SLICE = memoryview(bytes(1 << 18))


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--no-peers", action="store_true", help="leave transformers and PEFT out")
    with bench(parser, argv) as run:
        dense = make_base(run.folder / "dense", nbytes=run.options.nbytes)
        base = pack_base(run.folder / "base", dense)
        sizes = [path.stat().st_size for path in dense.glob("*.safetensors")]
        adapter = make_adapter(run.folder / "adapter", dense)
        shutil.rmtree(dense)
        contestants: dict[str, Callable[[], Sample]] = {"write": writing(run, sizes)}
        for digest in compared_digests():
            contestants[titled(digest)] = run.merge(base, adapter, *digest_options(digest))
        first = titled(compared_digests()[0])
        if not run.options.no_peers:
            contestants[f"{first}, past imports"] = rank_program(run, base, adapter, compared_digests()[0])
            contestants["transformers + PEFT"] = peer(run, "dequantized", base, adapter)
        run.rounds("nf4", contestants)
        run.table("nf4", {"durable": "durable", "ranks": "durable"}, to="write")
        if not run.options.no_peers:
            run.table("nf4", {"whole": "whole", "peak": "peak"}, to=first)
            run.table("nf4", {"past": "past"}, to=f"{first}, past imports")


def writing(run: Bench, sizes: list[int]) -> Callable[[], Sample]:
    """A contestant: files of `sizes` bytes, written and synced by this process."""

    def write() -> Sample:
        warm_memory(sum(sizes) + (1 << 30))
        run.output.mkdir()
        started = time.monotonic()
        for number, size in enumerate(sizes):
            with (run.output / f"{number}.bin").open("wb", buffering=0) as file:
                done = 0
                while done < size:
                    done += file.write(_SLICE[: size - done])
        seconds = time.monotonic() - started
        return {"whole": seconds, "durable": seconds + sync_folder(run.output)}

    return write


if __name__ == "__main__":
    main()
