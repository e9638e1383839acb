"""Changes recomputed in float64, with a bound on what float32 arithmetic may have moved each element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmerge.numerics.apply import Applied, Loaded, apply_changes, as_rows
from distmerge.numerics.combine import Combination, Delta, Part, choose, deltas_of, elected, keep, magnitude_of, mixed
from distmerge.numerics.lora import Factors

NOISE = 2.0**-24  # of one rounding to float32, relative
_SMALLEST = 2.0**-149
# Operators chain products whose rows keep their length, so that their noise goes with the row and not with the element.
_OPERATOR_STEPS = 64
# Another machine's float32 may err that many times as much as the largest error that is seen here.
_OTHER_MACHINES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """A block recomputed: its `values`, float64 and flat, and what each change did.

    `noise()` bounds for each element what float32 may have moved it by; `floor(places)` is never more, for some
    elements alone and from their values alone, which costs nothing.
    """

    values: Tensor
    applied: tuple[Applied, ...]
    floor: Callable[[Tensor], Tensor]
    noise: Callable[[], Tensor]


def exactly(base: Tensor) -> Exact:
    """The block `base`, float64 and flat, which nothing changes and nothing has moved."""
    return Exact(
        values=base,
        applied=(),
        floor=lambda places: torch.zeros_like(base[places]),
        noise=lambda: torch.zeros_like(base),
    )


def recompute(base: Tensor, changes: tuple[Loaded, ...], *, first: int, row_numel: int) -> Exact:
    """The block `base`, float64 and flat, after `changes` (loaded in float64).

    `first` is the number of the block's first element in a tensor with rows of `row_numel`.
    """
    oracle, top, left = as_rows(base.clone(), first, row_numel)
    applied = apply_changes(oracle, changes, top=top, left=left)
    depth = steps(changes)

    def noise() -> Tensor:
        rows = as_rows(base, first, row_numel)[0]
        magnitude = rows.abs()
        lengths = _lengths(rows)
        for change in changes:
            _add_magnitude(magnitude, change, lengths, top=top, left=left)
        return _bound(magnitude + oracle.abs(), depth).view(-1)

    values = oracle.view(-1)
    return Exact(values=values, applied=applied, floor=_floor(base, values, depth), noise=noise)


def recompute_combined(
    base: Tensor, combination: Combination, wide: tuple[Part, ...], *, block: int, first: int, row_numel: int
) -> Exact:
    """Like `recompute`, for changes that are combined: `combination`, loaded in float32, decides what counts, and the
    values are those of `wide`, the same parts in float64.

    Where float32 noise could have decided otherwise, the bound has room for either decision.
    """
    rows, top, left = as_rows(base, first, row_numel)
    exact, applied = deltas_of(rows, wide, top=top, left=left)
    rough, _ = deltas_of(rows.float(), combination.parts, top=top, left=left)
    chosen = choose(rough, combination, block=block)
    oracle = rows + mixed(exact, chosen, combination.combine)
    changes = [change for part in wide for change in part.changes]
    depth = 6.0 + len(changes) + len(exact) + sum(_steps(change) for change in changes)

    def noise() -> Tensor:
        sizes = []
        lengths = _lengths(rows)
        for delta in exact:
            size = torch.zeros_like(rows)
            for change in (change for part in wide if part.adapter == delta.adapter for change in part.changes):
                _add_magnitude(size, change, lengths, top=top, left=left)
            sizes.append(Delta(adapter=delta.adapter, weight=abs(delta.weight), values=size))
        magnitude = rows.abs() + oracle.abs() + mixed(sizes, chosen, combination.combine)
        return (_bound(magnitude, depth) + _room(exact, rough, combination, block=block)).view(-1)

    values = oracle.view(-1)
    return Exact(values=values, applied=applied, floor=_floor(base, values, depth), noise=noise)


def steps(changes: tuple[Loaded, ...]) -> float:
    """How many roundings of float32 an element may have gone through in `changes`, as `recompute` counts them."""
    return 3.0 + len(changes) + sum(_steps(change) for change in changes)


def _bound(magnitude: Tensor, depth: float) -> Tensor:
    return depth * (magnitude * NOISE + _SMALLEST)


def _floor(base: Tensor, values: Tensor, depth: float) -> Callable[[Tensor], Tensor]:
    return lambda places: _bound(base[places].abs() + values[places].abs(), depth)


def _room(exact: tuple[Delta, ...], rough: tuple[Delta, ...], combination: Combination, *, block: int) -> Tensor:
    """How far each element may lie off because another machine's float32 decides otherwise: 0 for nearly all."""
    kept = keep(rough, combination, block=block)
    errors = [_OTHER_MACHINES * float((a.values - b.values).abs().max()) for a, b in zip(exact, rough, strict=True)]
    doubt = torch.zeros_like(kept[0])
    slack = torch.zeros_like(exact[0].values)
    room = torch.zeros_like(slack)
    for number, (delta, error) in enumerate(zip(exact, errors, strict=True)):
        size, possible = delta.values.abs(), kept[number]
        if combination.combine.prunes:
            unsure = (rough[number].values.abs() - magnitude_of(combination.thresholds[number])).abs() < 2 * error
            doubt, possible = doubt | unsure, possible | unsure
            slack = slack + size * unsure
        slack = slack + error * possible
        room = room + size * possible * (abs(delta.weight) * combination.combine.scale)
    if combination.combine.elects:
        doubt |= elected(rough, kept).abs() < slack
    return room * doubt


def _lengths(matrix: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(matrix, dim=1, keepdim=True) + torch.linalg.vector_norm(matrix, dim=0)
    return lengths


def _steps(change: Loaded) -> int:
    return _OPERATOR_STEPS if change.factors is None else change.factors.a.shape[1]


def _add_magnitude(magnitude: Tensor, change: Loaded, lengths: Tensor, *, top: int, left: int) -> None:
    """Adds to `magnitude` what the terms of the products can be at most: |b| |a|, or for operators the `lengths`."""
    if change.factors is None:
        magnitude += lengths
        return
    sizes = Factors(a=change.factors.a.abs(), b=change.factors.b.abs(), scaling=abs(change.factors.scaling))
    apply_changes(magnitude, (replace(change, factors=sizes),), top=top, left=left)
