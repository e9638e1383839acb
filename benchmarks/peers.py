"""(b) distmerge beside the tools that people merge with today, on the same base and adapter: seconds of the whole
process (`whole`), past its imports (`past`), with the loading of the model left out where training holds it already
(`merge`), peak resident memory of the process tree, and the share of elements that are the nearest value to the sum
(`equal`).

axolotl and Unsloth-zoo run where they are installed; `--peers-python` names an interpreter that has them. What cannot
be imported is told, not guessed. Each tool runs as it is fastest: all cores, adapters in float32, one file for PEFT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Bench, Sample, arguments, bench, compared_digests, digest_options, say, titled
from benchmarks.models import make_adapter, make_base, share_equal

PROGRAM = Path(__file__).with_name("peer_program.py")
PEERS = {"PEFT": "peft", "axolotl": "axolotl", "Unsloth-zoo": "unsloth"}
_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter of the peers")
    with bench(parser, argv) as run:
        base = make_base(run.folder / "base", nbytes=run.options.nbytes)
        adapter = make_adapter(run.folder / "adapter", base)
        contestants: dict[str, Callable[[], Sample]] = {"cp": run.copy(base)}
        for digest in compared_digests():
            merge = run.merge(base, adapter, *digest_options(digest))
            contestants[titled(digest)] = checked(run, merge, base, adapter)
            contestants[f"{titled(digest)}, past imports"] = rank_program(run, base, adapter, digest)
        for name, program in PEERS.items():
            if why := missing(run, program):
                say(f"{name} does not run here: {why}")
                run.note("missing", peer=name, why=why)
            else:
                contestants[name] = checked(run, peer(run, program, base, adapter), base, adapter)
        run.rounds("peers", contestants)
        first = titled(compared_digests()[0])
        run.table("peers", {"whole": "whole", "durable": "durable", "peak": "peak"}, to=first)
        run.table("peers", {"past": "past"}, to=f"{first}, past imports")


def checked(run: Bench, contestant: Callable[[], Sample], base: Path, adapter: Path) -> Callable[[], Sample]:
    """The contestant, and the share of elements that it got right (`equal`), which no clock sees."""
    return lambda: {**contestant(), "equal": share_equal(base, adapter, run.output)}


def peer(run: Bench, program: str, base: Path, adapter: Path) -> Callable[[], Sample]:
    """A contestant: another tool's own way."""
    words = [_python(run), str(PROGRAM), program, str(base), str(adapter), str(run.output)]
    return lambda: stamped(run, words, base)


def rank_program(run: Bench, base: Path, adapter: Path, digest: str, *, nproc: int = 2) -> Callable[[], Sample]:
    """A contestant: distmerge under torchrun, which tells when its imports were done, and nothing else."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    words += [str(PROGRAM), "distmerge", str(base), str(adapter), str(run.output)]
    return lambda: {"past": stamped(run, words, base, {"BENCH_DIGEST": digest})["past"]}


def stamped(run: Bench, words: list[str], base: Path, env: dict[str, str] | None = None) -> Sample:
    """Runs a program that tells the times of its events; of several ranks the first to have imported counts, and the
    last to be done."""
    sample, done = run.program(words, base, env={**_ENV, **(env or {})})
    found: dict[str, list[float]] = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"event"'):
            event = json.loads(line)
            found.setdefault(event["event"], []).append(event["time"])
    sample["past"] = max(found["done"]) - min(found["imported"])
    return sample | ({"merge": max(found["done"]) - max(found["loaded"])} if "loaded" in found else {})


def missing(run: Bench, program: str) -> str:
    """Why a peer cannot run here; empty if it can be imported."""
    imports = {
        "peft": "import peft, transformers",
        "axolotl": "import axolotl.cli.utils.lora_merge",
        "unsloth": "import unsloth_zoo.saving_utils",
    }
    words = [_python(run), "-c", imports[program]]
    env = {**os.environ, **_ENV, "UNSLOTH_ZOO_DISABLE_GPU_INIT": "1"}
    done = subprocess.run(words, env=env, cwd=run.folder, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return lines[-1] if done.returncode and lines else ""


def _python(run: Bench) -> str:
    """The interpreter of the peers; links stay, since they are what makes an environment."""
    return str(Path(getattr(run.options, "peers_python", sys.executable)).absolute())


if __name__ == "__main__":
    main()
