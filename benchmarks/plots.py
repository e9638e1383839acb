"""Draws the figures of docs/performance.md from benchmarks/results; what was not measured is not drawn.

The only place of the benchmarks that knows matplotlib (the extra `report`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

from benchmarks.spread import ratios, spread_of
from benchmarks.tables import Log, contestants, median, read_log, size_line, sizes_of, values

RESULTS = Path(__file__).with_name("results")
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def main() -> None:
    for name, draw in PLOTS.items():
        path = RESULTS / f"{name}.jsonl"
        if path.exists():
            FIGURES.mkdir(exist_ok=True)
            figure = FIGURES / f"performance-{name}.png"
            figure.unlink(missing_ok=True)
            draw(read_log(path), figure)
            print(figure if figure.exists() else f"{path.name} has nothing to draw")


def _copies(log: Log, path: Path) -> None:
    """Streaming time over that of `cp -r`, by digest and by r."""
    bars: dict[str, list[float]] = {}
    for section in ("digest", "r"):
        copies = values(log, section, "cp", "whole")
        for name in contestants(log, section):
            if found := ratios(values(log, section, name, "stream"), copies):
                bars[name] = found
    _bars(path, bars, "seconds of the ranks, from first block to last, over those of cp -r (warm)", mark=1.0)


def _peers(log: Log, path: Path) -> None:
    bars = {name: found for name in contestants(log, "peers") if (found := values(log, "peers", name, "past"))}
    _bars(path, bars, "seconds past imports")


def _sizes(log: Log, path: Path) -> None:
    """Seconds and memory over the size of the model, with the line through the seconds."""
    sizes = {name: nbytes / 1e9 for name, nbytes in sizes_of(log).items()}
    if not sizes:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    seconds = [median(log, "size", name, "whole") for name in sizes]
    line = size_line(log, "whole")
    xs = [0.0, max(sizes.values())]
    left.plot(xs, [line.start + line.slope * x for x in xs], color="0.7", zorder=1)
    left.scatter(sizes.values(), seconds, zorder=2)
    left.set(xlabel="GB of bfloat16", ylabel="seconds, whole process", xlim=(0, None), ylim=(0, 1.1 * max(seconds)))
    peaks = [median(log, "size", name, "process_peak") / 1e6 for name in sizes]
    right.plot(sizes.values(), peaks, marker="o")
    right.set(
        xlabel="GB of bfloat16", ylabel="MB resident, largest process", xlim=(0, None), ylim=(0, 1.1 * max(peaks))
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(path: Path, bars: dict[str, list[float]], label: str, *, mark: float | None = None) -> None:
    if not bars:
        return
    spreads = [spread_of(found) for found in bars.values()]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.35 * len(bars)), layout="constrained")
    axes.barh(list(bars), [spread.median for spread in spreads], height=0.6)
    axes.hlines(list(bars), [spread.low for spread in spreads], [spread.high for spread in spreads], color="black")
    if mark is not None:
        axes.axvline(mark, color="0.5", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel=label, xlim=(0, None))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


PLOTS: dict[str, Callable[[Log, Path], None]] = {"cp": _copies, "peers": _peers, "size": _sizes}

if __name__ == "__main__":
    main()
