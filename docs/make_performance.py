"""Fills the tables of docs/performance.md and docs/log.md from benchmarks/results; a test holds the pages to them.

What stands between `<!-- NAME -->` and `<!-- end -->` belongs to this program, the rest of the pages to people.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file would not see the benchmarks

from benchmarks.tables import Log, contestants, median, ratio_table, read_log, sections, size_line, values

PAGES = tuple(Path(__file__).with_name(name) for name in ("performance.md", "log.md"))
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FIGURES = Path(__file__).with_name("figures")
_DRAWN = {
    "copies-digest": "Seconds of the ranks over those of cp -r",
    "peers": "Seconds past imports of distmerge and its peers",
    "sizes": "Seconds and memory against the size of the model",
}  # by benchmarks/plots.py
_STEPS = ("start", "read", "load", "compute", "measure", "hash", "write", "wait", "digest", "fsync", "publish")
_MARKED = re.compile(r"(<!-- ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_COPIED = {"stream": "whole", "ranks": "durable", "whole": "whole", "durable": "durable"}


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with its tables made anew."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{_table(match[2], results)}\n\n{match[4]}", text)


def _table(name: str, results: Path) -> str:
    log_name, make = TABLES[name]
    path = results / f"{log_name}.jsonl"
    if not path.exists():
        return f"Not measured yet: `make bench-{log_name}`."
    log = read_log(path)
    figure = FIGURES / f"performance-{log_name}.png" if name in _DRAWN else None
    drawn = [f"![{_DRAWN[name]}](figures/{figure.name})"] if figure is not None and figure.exists() else []
    return "\n\n".join([make(log), *drawn, _machine(log)])


def _machine(log: Log) -> str:
    told = log[0]
    options = told["options"]
    rounds = f"{options['rounds']} round{'s' * (options['rounds'] != 1)}"
    return (
        f"*{told['cpu']}, {told['cores']} cores (L2, L3: {told['l2_l3']}), {told['ram_gb']:.0f} GB, {told['kernel']}, "
        f"{told['file_system']}, torch {told['torch']}; {options['nbytes'] / 1e9:g} GB, {rounds}; "
        f"{told['date']}, {told['commit']}.*"
    )


def _copies(section: str) -> Callable[[Log], str]:
    return lambda log: ratio_table(log, section, _COPIED, to="cp")


def _dtypes(log: Log) -> str:
    return "\n\n".join(ratio_table(log, name, _COPIED, to="cp") for name in ("float16", "float32"))


def _first(log: Log, section: str) -> str:
    return next(name for name in contestants(log, section) if name.startswith("distmerge"))


def _peers(section: str) -> Callable[[Log], str]:
    def make(log: Log) -> str:
        first = _first(log, section)
        whole = ratio_table(log, section, {"whole": "whole", "peak": "peak"}, to=first)
        past = ratio_table(log, section, {"past": "past"}, to=f"{first}, past imports")
        right = [
            f"- {name}: {median(log, section, name, 'equal'):.4%} of the elements are the nearest value to the sum"
            for name in contestants(log, section)
            if values(log, section, name, "equal")
        ]
        absent = [f"{line['peer']} did not run: `{line['why']}`." for line in log if "peer" in line]
        return "\n\n".join([whole, past, *["\n".join(right)] * bool(right), *absent])

    return make


def _nf4(log: Log) -> str:
    written = ratio_table(log, "nf4", {"durable": "durable", "ranks": "durable"}, to="write")
    return f"{written}\n\n{_peers('nf4')(log)}" if values(log, "nf4", "transformers + PEFT", "past") else written


def _ranks(log: Log) -> str:
    measures = {"stream": "stream", "ranks": "ranks", "whole": "whole"}
    parts = [ratio_table(log, section, measures, to="1 rank") for section in sections(log)]
    pinned = [section for section in sections(log) if values(log, section, "2 ranks, 2 cores", "whole")]
    return "\n\n".join([*parts, *(ratio_table(log, section, measures, to="2 ranks, 2 cores") for section in pinned)])


def _sizes(log: Log) -> str:
    first = contestants(log, "size")[0]
    table = ratio_table(log, "size", {"whole": "whole", "ranks": "ranks", "process_peak": "process_peak"}, to=first)
    lines = []
    for measure, unit in (("whole", "s"), ("ranks", "s"), ("process_peak", "MB")):
        line = size_line(log, measure)
        sign = "-" if line.slope < 0 else "+"
        lines.append(
            f"- {measure.replace('_', ' ')}: {line.start:.3g} {unit} {sign} {abs(line.slope):.3g} {unit} for each GB "
            f"(R2 {line.r2:.4f})"
        )
    return "\n".join([table, "", *lines])


def _memory(log: Log) -> str:
    lines = ["| | budget | largest process, MB | beyond imports, MB |", "| --- | --- | --- | --- |"]
    for section in sections(log):
        imports = median(log, section, "imports", "process_peak")
        for name in contestants(log, section):
            peak = max(values(log, section, name, "process_peak"))
            budget = "" if name == "imports" else name
            what = "imports alone" if name == "imports" else section
            lines.append(f"| {what} | {budget} | {peak / 1e6:.0f} | {max(0.0, peak - imports) / 1e6:.0f} |")
    return "\n".join(lines)


def _products(log: Log) -> str:
    return "\n\n".join(ratio_table(log, name, {"gflops": "gflops"}, to="product") for name in sections(log))


def _steps(log: Log) -> str:
    lines = ["| step | CPU seconds for each GB | seconds on the clock |", "| --- | --- | --- |"]
    for name in contestants(log, "steps"):
        cpu, wall = (median(log, "steps", name, measure) for measure in ("cpu", "wall"))
        lines.append(f"| {name} | {cpu:.3f} | {wall:.3f} |")
    return "\n".join(lines)


def _profiles(log: Log) -> str:
    told = next((line for line in log if "profile.read" in line), None)
    if told is None:
        return "The log has no profiles."
    steps = [f"profile.{step}" for step in _STEPS if f"profile.{step}" in told]
    heads = [key.removeprefix("profile.") for key in steps]
    lines = [f"| seconds | {' | '.join(heads)} |", f"|{' --- |' * (1 + len(steps))}"]
    for name in contestants(log, "digest"):
        if values(log, "digest", name, "profile.read"):
            cells = [f"{median(log, 'digest', name, key):.2f}" for key in steps]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ways(section: str, measure: str) -> Callable[[Log], str]:
    return lambda log: ratio_table(log, section, {measure: measure}, to=contestants(log, section)[0])


TABLES: dict[str, tuple[str, Callable[[Log], str]]] = {
    "copies-digest": ("cp", _copies("digest")),
    "profiles": ("cp", _profiles),
    "copies-whole": ("cp6", _copies("digest")),
    "copies-cold": ("cp", _copies("cold")),
    "copies-r": ("cp", _copies("r")),
    "copies-dtype": ("cp", _dtypes),
    "peers": ("peers", _peers("peers")),
    "nf4": ("nf4", _nf4),
    "ranks": ("ranks", _ranks),
    "sizes": ("size", _sizes),
    "memory": ("memory", _memory),
    "products": ("matmul", _products),
    "steps": ("steps", _steps),
    "slices": ("steps", _ways("write", "wall")),
    "mapped": ("steps", _ways("read", "wall")),
    "whole": ("steps", _ways("product", "wall")),
}

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
