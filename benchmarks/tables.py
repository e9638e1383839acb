"""Tables of medians and ratios from the raw log of a benchmark, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.spread import Line, fit, ratios, spread_of

Log = list[dict[str, Any]]


def read_log(path: Path) -> Log:
    """The lines of a raw log; the first describes the machine, as does each that begins what was measured later."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def joined(earlier: Log, log: Log) -> Log:
    """A log that goes on from an earlier one, whose sections stay unless they were measured again; each section follows
    the description of the machine that it was measured on."""
    again = {line["section"] for line in log}
    kept: Log = []
    for line in earlier:
        if line["section"] == "machine" or line["section"] not in again:
            if line["section"] == "machine" and kept and kept[-1]["section"] == "machine":
                kept.pop()
            kept.append(line)
    if kept and kept[-1]["section"] == "machine":
        kept.pop()
    return [*kept, *log]


def machine_of(log: Log, section: str) -> dict[str, Any]:
    """The machine, the options and the commit that a section was measured with."""
    number = next(number for number, line in enumerate(log) if line["section"] == section and "contestant" in line)
    return next(line for line in reversed(log[:number]) if line["section"] == "machine")


def values(log: Log, section: str, contestant: str, measure: str) -> list[float]:
    """A measure of a contestant, round by round."""
    wanted = (section, contestant)
    found = [line for line in log if (line["section"], line.get("contestant")) == wanted and measure in line]
    return [line[measure] for line in sorted(found, key=lambda line: int(line["round"]))]


def median(log: Log, section: str, contestant: str, measure: str) -> float:
    """The median of a measure over the rounds; not a number if there are none."""
    return spread_of(values(log, section, contestant, measure)).median


def contestants(log: Log, section: str) -> list[str]:
    """The contestants of a section, in the order of the first round that was not thrown away."""
    names = [line["contestant"] for line in log if line["section"] == section and "contestant" in line]
    order = [line["names"] for line in log if line["section"] == section and "names" in line]
    return [name for name in order[-1] if name in names] if order else list(dict.fromkeys(names))


def sections(log: Log) -> list[str]:
    """The sections that have rounds."""
    return list(dict.fromkeys(line["section"] for line in log if "contestant" in line))


def ratio_table(log: Log, section: str, measures: Mapping[str, str], *, to: str) -> str:
    """A line for each contestant: the medians of `measures`, and the medians of their ratios, round by round, to the
    measures of `to` that they name, with quartiles in brackets."""
    heads = [f"{_head(mine)} | x {theirs} of {to}" for mine, theirs in measures.items()]
    lines = [f"| {section} | {' | '.join(heads)} |", f"|{' --- |' * (1 + 2 * len(measures))}"]
    for name in contestants(log, section):
        if not any(values(log, section, name, mine) for mine in measures):
            continue
        cells = [name]
        for mine, theirs in measures.items():
            own, others = values(log, section, name, mine), values(log, section, to, theirs)
            cells += [_number(mine, spread_of(own).median), str(spread_of(ratios(own, others)))] if own else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def size_line(log: Log, measure: str) -> Line:
    """The line of a measure's medians over the bytes of the models in GB, from the log of the benchmark of sizes."""
    sizes = sizes_of(log)
    scale = 1e6 if measure.endswith("peak") else 1.0
    medians = [median(log, "size", name, measure) / scale for name in sizes]
    return fit([nbytes / 1e9 for nbytes in sizes.values()], medians)


def sizes_of(log: Log) -> dict[str, float]:
    """The bytes of the models of the benchmark of sizes, by contestant; those that were measured."""
    sizes = next((line["sizes"] for line in log if "sizes" in line), {})
    return {name: sizes[name] for name in contestants(log, "size")}


def _head(measure: str) -> str:
    if measure.endswith("peak"):
        return f"{measure.replace('_', ' ')}, MB"
    return measure if measure == "gflops" else f"{measure}, s"


def _number(measure: str, value: float) -> str:
    return f"{value / 1e6:.0f}" if measure.endswith("peak") else f"{value:.3g}"
