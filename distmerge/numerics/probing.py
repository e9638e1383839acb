"""Merged weights as functions: what they make of vectors, against the unmerged weights with their factors beside them.

The product of the factors is never formed, and nothing is rounded: `B (A x)` in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distmerge.numerics.apply import Loaded
from distmerge.numerics.lora import Factors
from distmerge.numerics.noise import NOISE, steps
from distmerge.numerics.rounding import half_ulp

NUM_RANDOM = 8
# Of a normal variable, the chance to lie farther off than so many standard deviations is 1e-15.
_DEVIATIONS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """Columns (matrices, cols, n), float64: the first `NUM_RANDOM` standard normal, the others an orthonormal basis of
    the space that the factors of that matrix look at."""

    columns: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a tensor, or some of its rows, made of vectors, in sums of squares.

    Of random ones: `error` (merged x - unmerged x), `reference` (unmerged x), `noise` of float32, and `bound_used`, the
    largest error in terms of what rounding may make of it. Of the basis: `change` (merged x - base x), `delta` (B A x)
    and the `product` of these two. `room` is the sum of the squares of half an ulp over the `numel` elements.
    """

    numel: int = 0
    room: float = 0.0
    error: float = 0.0
    reference: float = 0.0
    noise: float = 0.0
    change: float = 0.0
    delta: float = 0.0
    product: float = 0.0
    bound_used: float = 0.0

    def __add__(self, other: Response) -> Response:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return Response(**{**sums, "bound_used": max(self.bound_used, other.bound_used)})

    @property
    def coefficient(self) -> float:
        """The multiple of the delta that the change is: exact, since the basis spans all that the delta looks at."""
        return self.product / self.delta if self.delta else 1.0

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.reference) if self.reference else math.sqrt(self.error)

    @property
    def is_doubtful(self) -> bool:
        """True if rounding, each element on its own, would hardly have given this. A delta that is lost in rounding is
        doubtful too."""
        if not self.bound_used <= 1:  # NaN counts
            return True
        if self.error > 1.5 * NUM_RANDOM * self.room / 3 + self.noise:
            return True
        deviation = math.sqrt(self.room / 3 / max(1, self.numel) / self.delta) if self.delta else 0.0
        return abs(self.coefficient - 1) > 0.02 + 6 * deviation


def vectors_for(changes: Sequence[Loaded], matrices: int, cols: int, generator: torch.Generator) -> Vectors:
    """The vectors for a tensor seen as `matrices` with rows of `cols`, to which `changes` add products."""
    random = torch.randn(cols, NUM_RANDOM, generator=generator, dtype=torch.float64)
    spaces = [_space(changes, matrix, cols) for matrix in range(matrices)]
    widest = max(space.shape[1] for space in spaces)
    columns = torch.zeros(matrices, cols, NUM_RANDOM + widest, dtype=torch.float64, device=spaces[0].device)
    columns[:, :, :NUM_RANDOM] = random.to(columns.device)
    for matrix, space in enumerate(spaces):
        columns[matrix, :, NUM_RANDOM : NUM_RANDOM + space.shape[1]] = space
    return Vectors(columns=columns)


def _space(changes: Sequence[Loaded], matrix: int, cols: int) -> Tensor:
    """An orthonormal basis (cols, n) of what the factors of one matrix look at."""
    wide = []
    device = torch.device("cpu")
    for change in changes:
        if change.factors is not None:
            device = change.factors.a.device
        if change.factors is not None and change.matrices[0] <= matrix < change.matrices[1]:
            a = change.factors.a[matrix - change.matrices[0]]
            rows = a.new_zeros(len(a), cols)
            rows[:, change.cols[0] : change.cols[1]] = a
            wide.append(rows)
    if not wide:
        return torch.zeros(cols, 0, dtype=torch.float64, device=device)
    basis: Tensor = torch.linalg.qr(torch.cat(wide).T)[0]
    return basis


def respond(base: Tensor, stored: Tensor, changes: Sequence[Loaded], vectors: Vectors, *, top: int) -> Response:
    """What whole rows make of `vectors`: `base` float64 and `stored` (rows, cols), from row `top` on, counted through
    all matrices, with `changes` loaded in float64."""
    total = Response()
    for matrix, rows, inner in parts_of(len(base), changes[0].height, top):
        x = vectors.columns[matrix]
        some = x[:, :NUM_RANDOM].abs()
        before, wide = base[rows], stored[rows].double()
        plain, merged = before @ x, wide @ x
        delta = _delta(changes, matrix, inner, x, outs=len(before))
        size = _delta(changes, matrix, inner, some, outs=len(before), magnitude=True)
        error = (merged - plain - delta)[:, :NUM_RANDOM]
        noise = steps(tuple(changes)) * NOISE * ((before.abs() + wide.abs()) @ some + size)
        room = half_ulp(stored[rows]).square_().sum(dim=1)
        allowed = _DEVIATIONS * room.sqrt()[:, None] + noise
        change, basis = (merged - plain)[:, NUM_RANDOM:], delta[:, NUM_RANDOM:]
        total += Response(
            numel=wide.numel(),
            room=float(room.sum()),
            error=_squared(error),
            reference=_squared((plain + delta)[:, :NUM_RANDOM]),
            noise=_squared(noise),
            change=_squared(change),
            delta=_squared(basis),
            product=float((change * basis).sum()),
            bound_used=_largest(error, allowed),
        )
    return total


def respond_to_given(
    base: Tensor, stored: Tensor, changes: Sequence[Loaded], x: Tensor, *, top: int, transposed: bool
) -> list[tuple[int, Tensor]]:
    """For rows as in `respond`, and given vectors `x` (in, n) of a layer: the error, the unmerged layer's own output,
    and the most that half an ulp and float32 noise in every element can make of it, each (3, out, n), with the number
    of the first output that they belong to. Transposed weights (in, out) give parts of sums, which are to be added."""
    found = []
    height, cols = changes[0].height, base.shape[1]
    for matrix, rows, inner in parts_of(len(base), height, top):
        before, wide, half = base[rows], stored[rows].double(), half_ulp(stored[rows])
        part = x[inner] if transposed else x
        if transposed:
            before, wide, half = before.T, wide.T, half.T
        outs = len(before)
        delta = _delta(changes, matrix, inner, part, outs=outs, transposed=transposed)
        size = _delta(changes, matrix, inner, part.abs(), outs=outs, magnitude=True, transposed=transposed)
        reference = before @ part + delta
        noise = steps(tuple(changes)) * NOISE * ((before.abs() + wide.abs()) @ part.abs() + size)
        first = matrix * cols if transposed else matrix * height + inner.start
        found.append((first, torch.stack([wide @ part - reference, reference, half @ part.abs() + noise])))
    return found


def used_of_bound(error: Tensor, allowed: Tensor) -> float:
    """The largest |error| in terms of what is allowed; infinity where a value is not finite."""
    return _largest(error, allowed)


def parts_of(num_rows: int, height: int, top: int) -> Iterator[tuple[int, slice, slice]]:
    """The matrices of `height` rows that `num_rows` rows from row `top` on touch: the number of each, its rows among
    those, and its rows in itself."""
    for matrix in range(top // height, (top + num_rows - 1) // height + 1):
        first, last = max(top, matrix * height), min(top + num_rows, (matrix + 1) * height)
        yield matrix, slice(first - top, last - top), slice(first - matrix * height, last - matrix * height)


def _delta(
    changes: Sequence[Loaded],
    matrix: int,
    rows: slice,
    x: Tensor,
    *,
    outs: int,
    magnitude: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`sum scaling B (A x)` for `rows` of one matrix, (outs, n), or with `magnitude` the same of all absolute
    values; transposed `sum scaling A' (B' x)`, where `x` is that of the rows."""
    total = x.new_zeros(outs, x.shape[1])
    for change in changes:
        first, last = max(rows.start, change.rows[0]), min(rows.stop, change.rows[1])
        factors = change.factors
        if factors is None or first >= last or not change.matrices[0] <= matrix < change.matrices[1]:
            continue
        a, b, scaling = _pair(factors, matrix - change.matrices[0], magnitude)
        b = b[first - change.rows[0] : last - change.rows[0]]
        here, across = slice(first - rows.start, last - rows.start), slice(*change.cols)
        if transposed:
            total[across] += scaling * (a.T @ (b.T @ x[here]))
        else:
            total[here] += scaling * (b @ (a @ x[across]))
    return total


def _pair(factors: Factors, number: int, magnitude: bool) -> tuple[Tensor, Tensor, float]:
    a, b = factors.a[number], factors.b[number]
    return (a.abs(), b.abs(), abs(factors.scaling)) if magnitude else (a, b, factors.scaling)


def _squared(values: Tensor) -> float:
    return float(values.square().sum())


def _largest(error: Tensor, allowed: Tensor) -> float:
    if not error.numel():
        return 0.0
    used = float((error.abs() / allowed.clamp_min(2.0**-200)).max())
    return used if math.isfinite(used) else math.inf
