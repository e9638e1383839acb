"""Fills the tables of docs/performance.md and docs/log.md from benchmarks/results; a test holds the pages to them.

What stands between `<!-- NAME -->` and `<!-- end -->` belongs to this program, the rest of the pages to people.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file would not see the benchmarks

from benchmarks.tables import Log, contestants, machine_of, median, ratio_table, read_log, sections, size_line, values

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


def state(results: Path = RESULTS) -> dict[str, list[str]]:
    """What is to be measured for the pages, by the name of the log: tables without figures, and those whose figures are
    of an older distmerge than this."""
    found: dict[str, list[str]] = {}
    for name, (log_name, wanted, _) in TABLES.items():
        path = results / f"{log_name}.jsonl"
        log = read_log(path) if path.exists() else []
        told = [_age(machine_of(log, section)) for section in _found(log, wanted)] or ["not measured"]
        if due := [text for text in dict.fromkeys(told) if text]:
            found.setdefault(log_name, []).append(f"{name}: {'; '.join(due)}")
    return found


def _age(machine: dict[str, Any]) -> str:
    """How much older than the working tree what was measured is; empty if it is the same code."""
    commit = machine["commit"].removesuffix("-dirty")
    words = ["git", "rev-list", "--count", f"{commit}..HEAD", "--", "distmerge", "benchmarks/models.py"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=RESULTS.parents[1], check=False)  # noqa: S603
    when = f"{machine['date']}, {machine['commit']}"
    if done.returncode:
        return f"of code that is not in this history ({when})"
    count = int(done.stdout)
    if count:
        return f"{count} commit{'s' * (count != 1)} older ({when})"
    return "of code that was not committed" if commit != machine["commit"] else ""


def _found(log: Log, wanted: tuple[str, ...]) -> list[str]:
    """The sections of a log that make a table: those that are wanted, or all of them; none if one is missing."""
    there = sections(log)
    return [] if set(wanted) - set(there) else list(wanted) or there


def _table(name: str, results: Path) -> str:
    log_name, wanted, make = TABLES[name]
    path = results / f"{log_name}.jsonl"
    log = read_log(path) if path.exists() else []
    found = _found(log, wanted)
    if not found:
        return f"Not measured yet: `make bench-{log_name}`."
    figure = FIGURES / f"performance-{log_name}.png" if name in _DRAWN else None
    drawn = [f"![{_DRAWN[name]}](figures/{figure.name})"] if figure is not None and figure.exists() else []
    machines = dict.fromkeys(_machine(machine_of(log, section)) for section in found)
    return "\n\n".join([make(log), *drawn, *machines])


def _machine(told: dict[str, Any]) -> str:
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


# By its name on the page: the log, the sections of it that must be there (all that are, if none is named), the table.
TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[Log], str]]] = {
    "copies-digest": ("cp", ("digest",), _copies("digest")),
    "profiles": ("cp", ("digest",), _profiles),
    "copies-whole": ("cp6", ("digest",), _copies("digest")),
    "copies-cold": ("cp", ("cold",), _copies("cold")),
    "copies-r": ("cp", ("r",), _copies("r")),
    "copies-dtype": ("cp", ("float16", "float32"), _dtypes),
    "peers": ("peers", ("peers",), _peers("peers")),
    "nf4": ("nf4", ("nf4",), _nf4),
    "ranks": ("ranks", (), _ranks),
    "sizes": ("size", ("size",), _sizes),
    "memory": ("memory", ("many tensors", "one tensor"), _memory),
    "products": ("matmul", (), _products),
    "steps": ("steps", ("steps",), _steps),
    "slices": ("steps", ("write",), _ways("write", "wall")),
    "mapped": ("steps", ("read",), _ways("read", "wall")),
    "whole": ("steps", ("product",), _ways("product", "wall")),
}


def main(words: list[str]) -> None:
    """Fills the pages; with `--state` says what is to be measured for them, with `--due` only by which logs."""
    due = state()
    if words == ["--due"]:
        print(*due)
        return
    if words != ["--state"]:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    for log, lines in due.items():
        print(f"make bench-{log}", *lines, sep="\n    ")
    print("make bench-due measures all of these" if due else "every figure is of this code")


if __name__ == "__main__":
    main(sys.argv[1:])
