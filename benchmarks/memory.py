"""(h) Peak resident memory of a rank at several budgets, on a model of many tensors and on one whose single tensor is
larger than every budget but the last.

`process_peak` is the kernel's own high-water mark of the largest process. `imports` is that of a process that imports
what a rank does and ends: what a rank has beyond it must fit the budget.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Bench, Sample, arguments, bench, digest_options, parse_nbytes
from benchmarks.models import make_adapter, make_base, make_single
from benchmarks.tables import median, values
from distmerge import config

BUDGETS = ("256MiB", "1GiB", "4GiB")
_IMPORTS = """
import re, pathlib
import distmerge.merge, distmerge.run, torch
torch.ones(256, 256) @ torch.ones(256, 256)
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--single-nbytes", type=parse_nbytes, default=4.3e9, help="bytes of the single tensor")
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    with bench(parser, argv) as run:
        _budgets(run, "many tensors", make_base(run.folder / "base", nbytes=run.options.nbytes))
        _budgets(run, "one tensor", make_single(run.folder / "base", nbytes=run.options.single_nbytes))


def _budgets(run: Bench, section: str, base: Path) -> None:
    adapter = make_adapter(run.folder / "adapter", base)
    options = digest_options("sha256")
    merges = {name: run.merge(base, adapter, *options, nproc=run.options.nproc, budget=name) for name in BUDGETS}
    run.rounds(section, {"imports": lambda: _imports(run, base), **merges})
    run.table(section, {"process_peak": "process_peak"}, to="imports")
    imports = median(run.log, section, "imports", "process_peak")
    for name in BUDGETS:
        beyond = max(values(run.log, section, name, "process_peak")) - imports
        print(
            f"{name}: {beyond / 2**20:.0f} MiB beyond imports, {beyond / config.parse_nbytes(name):.0%} of the budget"
        )
    shutil.rmtree(base)
    shutil.rmtree(adapter)


def _imports(run: Bench, base: Path) -> Sample:
    sample, done = run.program([sys.executable, "-c", _IMPORTS], base)
    return {"whole": sample["whole"], "process_peak": int(done.stdout.split()[-1]) * 1024}


if __name__ == "__main__":
    main()
