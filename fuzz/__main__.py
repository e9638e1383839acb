"""`python -m fuzz TARGET [SECONDS]`: one target under atheris, from its corpus, until something breaks the law.

What was found stays in `.fuzz/TARGET`: inputs that reached something new, and `crash-*`, `timeout-*` or `oom-*`. A
crash becomes a regression by a copy of its file to `fuzz/corpus/TARGET`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import atheris

from fuzz.law import CORPUS, NBYTES, SCRATCH, SECONDS, scratch

TARGETS = sorted(path.stem for path in (Path(__file__).parent / "targets").glob("[a-z]*.py"))


def main(name: str, seconds: str = "600") -> None:
    with atheris.instrument_imports(include=["distmerge", "yaml"], enable_loader_override=False):
        target: Any = importlib.import_module(f"fuzz.targets.{name}")
    counts = {"tried": 0, "taken": 0}

    def one(data: bytes) -> None:
        counts["tried"] += 1
        counts["taken"] += target.one(data)
        if counts["tried"] % 100 == 0:  # libFuzzer ends the process without a word to Python
            (found / "counts.json").write_text(json.dumps(counts))
        if counts["tried"] % 500 == 0:
            gc.collect()  # what hypothesis leaves would look like a leak

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        made = target.changed(data, chance) if chance.random() < 0.7 else atheris.Mutate(data, max_size)
        return bytes(made[:max_size])

    found = Path(".fuzz") / name
    found.mkdir(parents=True, exist_ok=True)
    one(b"")  # imports what is imported late
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    options = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={used + (NBYTES >> 20)}"]
    options += [f"-artifact_prefix={found}/", "-max_len=20000", "-print_final_stats=1", "-reload=0"]
    mutators = {"custom_mutator": mutator} if hasattr(target, "changed") else {}
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], one, **mutators)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m fuzz TARGET [SECONDS]; targets are {', '.join(TARGETS)}")
    if SCRATCH not in os.environ:  # libFuzzer ends its process before that can tidy up
        command = [sys.executable, "-m", "fuzz", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, SCRATCH: str(scratch())}, check=False).returncode)
    main(*sys.argv[1:])
