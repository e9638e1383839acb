"""What is left of a change once it is rounded into a weight: sums over blocks, norms and cosine of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.numerics.compiled import measure_block

# Smaller sums of squares of float32 values have lost digits, or all of them.
_SMALLEST = 1e-30
_WIDE_NUMEL = 1 << 16  # elements that are in float64 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over elements of one tensor: W is the base's value, D what was added to it in float32, A what of it is left
    after rounding, the stored value less W.

    `unchanged` counts A = 0, `largest_delta` is the largest |D|; the others are sums of W^2, D^2, A^2 and D A. Where
    a base was rounded on purpose, `quant_squared` is the sum of (original - W)^2; where the output is packed,
    `pack_squared` is that of (stored value - rounded W + D)^2, and `plain_pack_squared` what it is with the largest
    magnitudes as scales. They are null where there is nothing to say.
    """

    numel: int
    unchanged: int
    largest_delta: float
    base_squared: float
    delta_squared: float
    applied_squared: float
    product: float
    quant_squared: float | None = None
    pack_squared: float | None = None
    plain_pack_squared: float | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.base_squared + self.delta_squared + self.applied_squared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """What is left of the change to a tensor: Frobenius norms of the base's values W, of what was added, D, and of what
    is left of it after rounding, A; the cosine of D and A, null where one of them is zero; the share of elements with
    A = 0; the largest |D|. `quant_error` and `pack_error` are the norms of what rounding the base on purpose and
    packing the output cost, `plain_pack_error` of what packing it with plain scales would have; null where that was
    not done or not measured. Raises ValueError for numbers that float32 tensors cannot have."""

    base_norm: float
    delta_norm: float
    applied_norm: float
    cosine: float | None
    unchanged: float
    largest_delta: float
    quant_error: float | None
    pack_error: float | None
    plain_pack_error: float | None

    def __post_init__(self) -> None:
        norms = (self.base_norm, self.delta_norm, self.applied_norm, self.largest_delta)
        check_sizes(*norms, self.quant_error or 0.0, self.pack_error or 0.0, self.plain_pack_error or 0.0)
        if not 0 <= self.unchanged <= 1 or not -1 <= (self.cosine or 0.0) <= 1:
            raise ValueError(f"a share of {self.unchanged} or a cosine of {self.cosine}")

    @property
    def kept(self) -> float | None:
        """The share of the change that is left along its own direction, <A, D> / |D|^2: 1 if nothing was lost, null if
        nothing was added."""
        return (self.cosine or 0.0) * self.applied_norm / self.delta_norm if self.delta_norm else None

    @property
    def noise(self) -> float | None:
        """|A - D| / |D|: what rounding added to the change or took from it, as a share of it."""
        if self.delta_norm == 0:
            return None
        ratio, cosine = self.applied_norm / self.delta_norm, self.cosine or 0.0
        return math.sqrt(max(0.0, 1 + ratio * (ratio - 2 * cosine)))


def measure(base: Tensor, work: Tensor, out: Tensor, scratch: tuple[Tensor, Tensor]) -> Sums:
    """The sums of a block, flat: `base` and `out` in any float dtype, `work` the float32 values before they were
    rounded to `out`.

    `work` may be overwritten. The two float32 tensors of `scratch`, equally long and of at most 2^24 elements, bound
    what is looked at at once. The sums are float32 arithmetic's, but where it cannot hold them.
    """
    found = measure_block(base, work, out)
    if found is not None and (sums := exact_sums(found, len(work))) is not None:
        return sums
    step = len(scratch[0])
    parts = [
        _measure(base[i : i + step], work[i : i + step], out[i : i + step], scratch) for i in range(0, len(work), step)
    ]
    return total(parts)


def exact_sums(found: list[float], numel: int) -> Sums | None:
    """The sums that compiled code has `found` of `numel` elements; None if float32 arithmetic could not hold them."""
    *norms, along, unchanged, largest = found
    sums = _sums(numel, norms, along, int(unchanged), largest)
    return sums if _is_exact(sums) else None


def total(parts: Sequence[Sums]) -> Sums:
    """The sums of all `parts`, the same in whatever order they come."""
    return Sums(
        numel=sum(part.numel for part in parts),
        unchanged=sum(part.unchanged for part in parts),
        largest_delta=max((part.largest_delta for part in parts), default=0.0),
        base_squared=math.fsum(part.base_squared for part in parts),
        delta_squared=math.fsum(part.delta_squared for part in parts),
        applied_squared=math.fsum(part.applied_squared for part in parts),
        product=math.fsum(part.product for part in parts),
        quant_squared=_known([part.quant_squared for part in parts]),
        pack_squared=_known([part.pack_squared for part in parts]),
        plain_pack_squared=_known([part.plain_pack_squared for part in parts]),
    )


def survival_of(base: Tensor, delta: Tensor, out: Tensor) -> Sums:
    """The sums of a block in float64: `base` and `out` as stored, in any float dtype, and `delta`, what was added."""
    wide, delta = base.double(), delta.double()
    applied = out.double() - wide
    return Sums(
        numel=base.numel(),
        unchanged=int((applied == 0).sum()),
        largest_delta=float(delta.abs().max()) if delta.numel() else 0.0,
        base_squared=float(wide.square().sum()),
        delta_squared=float(delta.square().sum()),
        applied_squared=float(applied.square().sum()),
        product=float((delta * applied).sum()),
    )


def squared(values: Tensor) -> float:
    """The sum of the squares of `values`, float32 and flat: float32 arithmetic's, but where it cannot hold them."""
    found = float(torch.dot(values, values))
    if _SMALLEST < found < math.inf:
        return found
    parts = (values[i : i + _WIDE_NUMEL].cpu().double() for i in range(0, len(values), _WIDE_NUMEL))
    return math.fsum(float(part.square().sum()) for part in parts)


def summarize(sums: Sums) -> Survival:
    """Norms, cosine and share of a whole tensor, rounded to 6 significant digits."""
    delta, applied = math.sqrt(sums.delta_squared), math.sqrt(sums.applied_squared)
    cosine = max(-1.0, min(1.0, sums.product / delta / applied)) if delta and applied else None
    return Survival(
        base_norm=digits(math.sqrt(sums.base_squared)),
        delta_norm=digits(delta),
        applied_norm=digits(applied),
        cosine=None if cosine is None else digits(cosine),
        unchanged=digits(sums.unchanged / sums.numel) if sums.numel else 0.0,
        largest_delta=digits(sums.largest_delta),
        quant_error=_root(sums.quant_squared),
        pack_error=_root(sums.pack_squared),
        plain_pack_error=_root(sums.plain_pack_squared),
    )


def check_sizes(*values: float) -> None:
    """Raises ValueError unless all `values` are 0 or a size that float32 tensors can have."""
    if wrong := [value for value in values if value != 0 and not 1e-60 < value < 1e60]:
        raise ValueError(f"a norm of {wrong[0]}")


def digits(value: float) -> float:
    """`value` with 6 significant digits."""
    return float(f"{value:.6g}")


def _measure(base: Tensor, work: Tensor, out: Tensor, scratch: tuple[Tensor, Tensor]) -> Sums:
    before, applied = (one[: len(work)] for one in scratch)
    before.copy_(base)
    applied.copy_(out).sub_(before)
    delta = work.sub_(before)
    low, high = torch.aminmax(delta)
    squares = [torch.dot(each, each) for each in (before, delta, applied)]
    product = torch.dot(delta, applied)
    count = applied.ne_(0).sum()  # a third of what count_nonzero takes
    # One wait for the accelerator, not seven.
    *norms, along, least, most, num_changed = torch.stack([*squares, product, low, high, count]).tolist()
    sums = _sums(len(work), norms, along, len(work) - int(num_changed), max(-least, most))
    return sums if _is_exact(sums) else survival_of(base.cpu(), delta.cpu(), out.cpu())


def _sums(numel: int, norms: list[float], product: float, unchanged: int, largest: float) -> Sums:
    base, delta, applied = norms
    return Sums(
        numel=numel,
        unchanged=unchanged,
        largest_delta=largest,
        base_squared=base,
        delta_squared=delta,
        applied_squared=applied,
        product=product,
    )


def _is_exact(sums: Sums) -> bool:
    """True if float32 arithmetic could hold the sums."""
    squares = [sums.base_squared]
    squares += [sums.delta_squared] if sums.largest_delta != 0 else []
    squares += [sums.applied_squared] if sums.unchanged < sums.numel else []
    return all(_SMALLEST < value < math.inf for value in squares)


def _root(squared: float | None) -> float | None:
    return None if squared is None else digits(math.sqrt(squared))


def _known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None
