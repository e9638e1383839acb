"""The changed tensors of a receipt by layer and module: what figures and tables show."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distmerge.numerics.survival import Survival
from distmerge.receipt import TensorEntry
from distmerge.report.verdict import score

_NUMBER = re.compile(r"(?:^|\.)(\d{1,6})(?=\.|$)")
_TAIL = ".weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Where a tensor is, by its name: the number of its layer, null where the name has none, and its module, with a
    star for every further number, so that the experts of a layer are one. `stack` is what stands before the layer."""

    stack: str
    layer: int | None
    module: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The changed tensors of one module in one layer: |D|/|W| over all of them, the cosine and the share of the change
    that is left over all of them, and the worst score of any. Null where nothing was added."""

    num_tensors: int
    relative_delta: float | None
    cosine: float | None
    kept: float | None
    worst: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Cells by (module, layer); the layers that occur, in order, None for tensors without one at the end."""

    modules: tuple[str, ...]
    layers: tuple[int | None, ...]
    cells: Mapping[tuple[str, int | None], Cell]

    @property
    def is_layered(self) -> bool:
        """True if there is more than one layer to compare."""
        return sum(layer is not None for layer in self.layers) > 1

    def of_layer(self, layer: int | None) -> list[Cell]:
        return [cell for (_, at), cell in self.cells.items() if at == layer]


def spot(name: str) -> Spot:
    """Where the tensor called `name` is."""
    short = name.removesuffix(_TAIL)
    if (found := _NUMBER.search(short)) is None:
        return Spot(stack="", layer=None, module=short)
    rest = short[found.end() :].removeprefix(".")
    return Spot(stack=short[: found.start()], layer=int(found[1]), module=_NUMBER.sub(_starred, rest) or "*")


def make_grid(tensors: Mapping[str, TensorEntry], *, max_modules: int = 40) -> Grid:
    """The grid of the tensors to which something was added. Rarer modules than `max_modules` are one row."""
    changed = {name: entry.survival for name, entry in tensors.items() if _added(entry)}
    spots = {name: spot(name) for name in changed}
    stacks = {one.stack for one in spots.values() if one.layer is not None}
    labels = {name: _label(one, several=len(stacks) > 1) for name, one in spots.items()}
    counts = Counter(labels.values())
    shown = [label for label, _ in counts.most_common(max_modules)]
    rest = f"{len(counts) - len(shown)} more modules"
    groups: dict[tuple[str, int | None], list[Survival]] = {}
    for name, survival in changed.items():
        if survival is not None:
            label = labels[name] if labels[name] in shown else rest
            groups.setdefault((label, spots[name].layer), []).append(survival)
    present = {label for label, _ in groups}
    ordered = [label for label in (*dict.fromkeys(labels.values()), rest) if label in present]
    layers = {layer for _, layer in groups}
    return Grid(
        modules=tuple(dict.fromkeys(ordered)),
        layers=tuple(sorted(layers, key=lambda layer: math.inf if layer is None else layer)),
        cells={place: _cell(found) for place, found in groups.items()},
    )


def spectra(tensors: Mapping[str, TensorEntry], *, max_modules: int = 7) -> dict[str, tuple[float, ...]]:
    """By module the median over its tensors of their singular values, each divided by the largest of its tensor. The
    modules are those with the most tensors."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for name, entry in tensors.items():
        values = entry.singular_values
        if len(values) > 1 and values[0] > 0:
            found.setdefault(spot(name).module, []).append(tuple(value / values[0] for value in values))
    most = sorted(found, key=lambda module: -len(found[module]))[:max_modules]
    return {module: _medians(found[module]) for module in found if module in most}


def errors(tensors: Mapping[str, TensorEntry], of: Callable[[Survival], float | None]) -> dict[str, float]:
    """By module the median over its tensors of an error `of` them, as a multiple of |D|; those where it is known."""
    found: dict[str, list[float]] = {}
    for name, entry in tensors.items():
        survival = entry.survival
        if survival is not None and survival.delta_norm and (error := of(survival)) is not None:
            found.setdefault(spot(name).module, []).append(error / survival.delta_norm)
    return {module: statistics.median(values) for module, values in found.items()}


def _starred(found: re.Match[str]) -> str:
    return "." * found[0].startswith(".") + "*"


def _added(entry: TensorEntry) -> bool:
    return entry.survival is not None and entry.survival.delta_norm > 0


def _label(one: Spot, *, several: bool) -> str:
    return f"{one.stack}.{one.module}" if several and one.layer is not None and one.stack else one.module


def _cell(found: Sequence[Survival]) -> Cell:
    delta = math.hypot(*(one.delta_norm for one in found))
    applied = math.hypot(*(one.applied_norm for one in found))
    base = math.hypot(*(one.base_norm for one in found))
    product = math.fsum((one.cosine or 0.0) * one.delta_norm * one.applied_norm for one in found)
    return Cell(
        num_tensors=len(found),
        relative_delta=delta / base if base else None,
        cosine=product / delta / applied if applied else 0.0,
        kept=product / delta**2,
        worst=min(score(one) for one in found),
    )


def _medians(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(
        statistics.median(row[place] for row in rows if len(row) > place) for place in range(max(map(len, rows)))
    )
