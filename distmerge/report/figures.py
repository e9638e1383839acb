"""The figures of a report, as SVG for its page and as PNG for a model card: the only door to matplotlib."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from distmerge.errors import printable
from distmerge.report.survey import Cell, Grid
from distmerge.runlog import RankLog

# Okabe and Ito's colours, which colour-blind readers tell apart, without their yellow; darker for light paper.
_SERIES = ("#0072b2", "#c75000", "#00815d", "#a9558a", "#4aa3df", "#9a6a00", "#555f69")
# From lost to left: darker is worse, for colour-blind readers too, and nothing glares where all is well.
_LEFT = LinearSegmentedColormap.from_list("left", ["#6b1a00", "#d0601a", "#f0bd84", "#c9d8e6"])
_INK, _FAINT = "#1c2126", "#c9cfd5"
_WIDTH = 4.7  # inches; half a page, and the width of a telephone
_MANY_CELLS = 2000
_MAX_RANKS = 48
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # names of tensors may hold dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "distmerge",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure as `svg`, in colours that the page's style sheet sets, and as `png` on white."""

    svg: str
    png: bytes


def heat_map(grid: Grid, value: Callable[[Cell], float | None], *, label: str, unit_range: bool) -> Drawing:
    """Layers from left to right, modules from top to bottom, the `value` of each cell as a colour; from 0 to 1 with
    `unit_range`, otherwise over the values that occur, logarithmic where they differ much."""
    rows = [[_shown(grid.cells.get((module, layer)), value) for layer in grid.layers] for module in grid.modules]
    known = [one for row in rows for one in row if not math.isnan(one)]
    norm, colours = (Normalize(0, 1), _LEFT) if unit_range else (_norm(known), "cividis")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        edges = "none" if len(grid.layers) * len(grid.modules) > _MANY_CELLS else "face"
        style: dict[str, Any] = {"rasterized": edges == "none", "edgecolors": edges, "linewidth": 0.1}
        mesh = axes.pcolormesh(rows, norm=norm, cmap=colours, **style)
        axes.set_yticks([row + 0.5 for row in range(len(grid.modules))], [_short(name) for name in grid.modules])
        _layer_ticks(axes, grid.layers)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", pad=0.02, aspect=40, shrink=0.7)
        bar.set_label(label)
        if isinstance(norm, LogNorm):
            bar.set_ticks(round_numbers(min(known), max(known)))
            bar.minorticks_off()
            bar.formatter = FuncFormatter(lambda value, _: f"{value:g}")
        bar.outline.set_visible(False)

    return _drawn(draw, height=1.55 + 0.22 * len(grid.modules))


def by_layer(grid: Grid) -> Drawing:
    """Over the layers the means over their modules of the cosine and of the share that is left, and the band from the
    worst tensor to the best module."""
    layers = [layer for layer in grid.layers if layer is not None]
    cells = [grid.of_layer(layer) for layer in layers]
    cosines = [[cell.cosine or 0.0 for cell in found] for found in cells]
    shares = [[cell.kept or 0.0 for cell in found] for found in cells]
    lows = [min(cell.worst or 0.0 for cell in found) for found in cells]
    highs = [max(map(min, *pair)) for pair in zip(cosines, shares, strict=True)]
    lowest = min(lows)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.fill_between(layers, lows, highs, color=_SERIES[0], alpha=0.18, linewidth=0, label="worst to best")
        for number, (name, values) in enumerate((("cosine", cosines), ("share left", shares))):
            means = [statistics.fmean(of_layer) for of_layer in values]
            colour, marker = _SERIES[number], "os"[number]
            axes.plot(layers, means, label=name, color=colour, marker=marker, markersize=3, linewidth=1.4)
        axes.set_ylim(lowest - 0.1 * (1.0 - lowest) if lowest > 0.5 else 0, 1 + 0.1 * (1.0 - min(lowest, 0.98)))
        axes.axhline(1, color=_FAINT, linewidth=0.8, zorder=0)
        _plain(axes, x="layer", y="of the change, 1 is all")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="best")

    return _drawn(draw, height=3.0)


def by_name(grid: Grid) -> Drawing:
    """A bar for each module: the share of its change that is left. For models without layers."""
    places = list(grid.cells)[:40]
    names = [name if layer is None else f"{layer}.{name}" for name, layer in places]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(
            range(len(places)), [grid.cells[place].worst or 0.0 for place in places], color=_SERIES[0], height=0.6
        )
        axes.set_yticks(range(len(places)), [_short(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        _plain(axes, x="worst of cosine and share left, 1 is all", y="")

    return _drawn(draw, height=1.0 + 0.26 * len(places))


def spectrum(found: Mapping[str, Sequence[float]]) -> Drawing:
    """Singular values by module over their number, the largest of each delta 1, on a logarithmic scale."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (module, values) in enumerate(found.items()):
            points = [(place, value) for place, value in enumerate(values, start=1) if value > 0]
            axes.plot(
                *zip(*points, strict=True),
                color=_SERIES[number % len(_SERIES)],
                label=_short(module),
                marker="os^Dv<>"[number % 7],
                markersize=3.5,
                linewidth=1.2,
            )
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain_numbers(axes.yaxis)
        _plain(axes, x="singular value, by size", y="relative to the largest")
        figure.legend(frameon=False, loc="outside lower center", ncols=2)

    return _drawn(draw, height=3.0 + 0.2 * math.ceil(len(found) / 2))


def error_lines(found: Mapping[str, float], *, label: str) -> Drawing:
    """For each module how far it is from a line where the error is as large as the change, on a logarithmic scale."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [max(value, 1e-6) for value in found.values()]
        axes.hlines(range(len(found)), 1, values, color=_SERIES[1], linewidth=2)
        axes.plot(values, range(len(found)), "o", color=_SERIES[1], markersize=6)
        axes.axvline(1, color=_INK, linewidth=0.8)
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_yticks(range(len(found)), [_short(name) for name in found])
        axes.invert_yaxis()
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        _plain(axes, x=label, y="")

    return _drawn(draw, height=1.0 + 0.26 * len(found))


def time_lines(logs: Sequence[RankLog]) -> Drawing:
    """A line for each rank, the slowest where there are many: when it worked on segments, and when it waited."""
    shown = sorted(sorted(logs, key=lambda log: -log.end)[:_MAX_RANKS], key=lambda log: log.rank)
    zero = min(log.start for log in logs)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, log in enumerate(shown):
            axes.barh(row, log.seconds, left=log.start - zero, height=0.5, color=_FAINT)
            for kept, colour in ((False, _SERIES[0]), (True, _SERIES[2])):
                spans = [(s.start - zero, s.end - s.start) for s in log.spans if s.kept == kept]
                axes.broken_barh(spans, (row - 0.25, 0.5), color=colour, linewidth=0)
        axes.set_yticks(range(len(shown)), [f"rank {log.rank}" for log in shown])
        axes.invert_yaxis()
        _plain(axes, x="seconds since the first rank began", y="")

    return _drawn(draw, height=1.0 + 0.26 * len(shown))


def _drawn(draw: Callable[[Figure], None], *, height: float) -> Drawing:
    with mpl.rc_context(_settings()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that its font lacks; browsers have others
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawing(svg=_inlined(svg.getvalue()), png=png.getvalue())


def _settings() -> Any:
    """What matplotlib does by default, whatever the user's matplotlibrc says, in the style of the page."""
    return {**mpl.rcParamsDefault, **_STYLE}


def _inlined(svg: str) -> str:
    """The <svg> element for a page, with the colours and the font of the page."""
    body = svg[svg.index("<svg") :]
    for colour, variable in ((_INK, "--ink"), (_FAINT, "--line"), *((c, f"--c{i}") for i, c in enumerate(_SERIES))):
        body = body.replace(f": {colour}", f": var({variable})")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    head, rest = body.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def _norm(values: Sequence[float]) -> Normalize:
    low, high = min(values), max(values)
    if low > 0 and high > 3 * low:
        return LogNorm(low, high)
    return Normalize(min(low, 0.98 * high), high) if high else Normalize(0, 1)


def round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`, powers of ten alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return found if len(found) <= 6 else [value for value in found if f"{value:e}".startswith("1")]


def _shown(cell: Cell | None, value: Callable[[Cell], float | None]) -> float:
    found = None if cell is None else value(cell)
    return math.nan if found is None else found


def _layer_ticks(axes: Axes, layers: Sequence[int | None]) -> None:
    step = max(1, math.ceil(len(layers) / 12))
    last = len(layers) - 1
    end = last - step / 2 if layers[last] is None else last  # the mark for tensors without a layer needs room
    places = [place for place in range(0, len(layers), step) if place <= end]
    places += [last] * (layers[last] is None)
    axes.set_xticks([place + 0.5 for place in places], ["-" if layers[p] is None else str(layers[p]) for p in places])
    axes.set_xlabel("layer")


def _plain_numbers(axis: Axis) -> None:
    """Numbers as 0.01 at a logarithmic axis, whose own are formulas; few, but never only one."""
    low, high = sorted(axis.get_view_interval())
    numbers = round_numbers(low, high)
    if len(numbers) < 2:  # less than a factor of two or so: tenths
        step = 0.1 * 10.0 ** math.floor(math.log10(high))
        numbers = [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)][:12]
    axis.set_major_locator(FixedLocator(numbers))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _plain(axes: Axes, *, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(name: str, limit: int = 26) -> str:
    shown = printable(name)
    return shown if len(shown) <= limit else f"…{shown[1 - limit :]}"
