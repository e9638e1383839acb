"""Deltas of several adapters combined: which elements of each are kept, whose sign wins, what is added to the base.

A delta is what one adapter adds to one tensor, its weight apart. What is kept and whose sign wins is decided on the
float32 values of a block; the values that are then combined may be of any dtype.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.numerics.apply import Applied, Loaded, apply_changes
from distmerge.numerics.lora import delta_norm
from distmerge.numerics.methods import Combine

_UPPER_BINS, _LOWER_BINS = 1 << 15, 1 << 16  # the sign is not among the upper bits of a magnitude


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one adapter folder does to a tensor: `changes`, loaded with weight 1, which count `sign` times in the delta
    of adapter number `adapter`, counted from 1. `weight` is that adapter's."""

    adapter: int
    weight: float
    sign: float
    changes: tuple[Loaded, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """All that is done to one tensor: `parts` in the order of the adapters. `name` is what chance goes by;
    `thresholds` has for each delta the bits of the smallest magnitude that is kept, where magnitudes decide."""

    combine: Combine
    name: str
    parts: tuple[Part, ...]
    thresholds: tuple[int, ...] = ()

    @property
    def delta_norms(self) -> tuple[float, ...]:
        """For each change the norm of its weighted delta as far as factors tell it, 0 for operators."""
        return tuple(
            abs(part.weight) * delta_norm(change.factors) if change.factors else 0.0
            for part in self.parts
            for change in part.changes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What adapter number `adapter` adds to a block, without its weight."""

    adapter: int
    weight: float
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The elements of each delta that count, as masks, and how many of them there are at each element (1 where there
    is none) if their mean is taken."""

    counted: tuple[Tensor, ...]
    count: Tensor | None


def combine_changes(work: Tensor, combination: Combination, *, block: int, top: int, left: int) -> tuple[Applied, ...]:
    """Adds the combined deltas to `work` (rows, cols), the base's values of block number `block`, in place. Returns
    what each change did, in the order of the parts."""
    deltas, applied = deltas_of(work, combination.parts, top=top, left=left)
    work.add_(mixed(deltas, choose(deltas, combination, block=block), combination.combine))
    return applied


def deltas_of(
    base: Tensor, parts: Sequence[Part], *, top: int, left: int
) -> tuple[tuple[Delta, ...], tuple[Applied, ...]]:
    """The deltas of a block, one for each adapter, and what each change did. Operators work on `base` (rows, cols),
    which is not changed; without operators it is not looked at."""
    deltas: dict[int, Delta] = {}
    applied: list[Applied] = []
    for part in parts:
        operates = any(change.operator for change in part.changes)
        values = base.clone() if operates else torch.zeros_like(base)
        done = apply_changes(values, part.changes, top=top, left=left)
        applied += [Applied(numel=one.numel, squared=one.squared * part.weight**2) for one in done]
        if operates:
            values.sub_(base)
        if part.adapter in deltas:
            deltas[part.adapter].values.add_(values, alpha=part.sign)
        else:
            values = values if part.sign > 0 else values.neg_()
            deltas[part.adapter] = Delta(adapter=part.adapter, weight=part.weight, values=values)
    return tuple(deltas.values()), tuple(applied)


def choose(deltas: Sequence[Delta], combination: Combination, *, block: int) -> Chosen:
    """The elements that count, decided on the float32 values of `deltas`."""
    kept = keep(deltas, combination, block=block)
    if not combination.combine.elects:
        return Chosen(counted=tuple(kept), count=None)
    positive = elected(deltas, kept) >= 0
    for delta, mask in zip(deltas, kept, strict=True):
        mask.logical_and_(torch.where(positive, delta.values > 0, delta.values < 0))
    count = torch.zeros_like(positive, dtype=torch.int32)
    for mask in kept:
        count += mask
    return Chosen(counted=tuple(kept), count=count.clamp_(min=1))


def keep(deltas: Sequence[Delta], combination: Combination, *, block: int) -> list[Tensor]:
    """The elements of each delta that are kept, by their float32 values or by chance, before any sign is looked at."""
    if combination.combine.prunes:
        return [magnitude_bits(d.values) >= bits for d, bits in zip(deltas, combination.thresholds, strict=True)]
    return [_drawn(delta, combination, block) for delta in deltas]


def elected(deltas: Sequence[Delta], kept: Sequence[Tensor]) -> Tensor:
    """The unweighted sum of what is kept of each delta; its sign is the majority's, and that of 0 is plus."""
    total = torch.zeros_like(deltas[0].values)
    for delta, mask in zip(deltas, kept, strict=True):
        total += delta.values * mask
    return total


def mixed(deltas: Sequence[Delta], chosen: Chosen, combine: Combine) -> Tensor:
    """The weighted sum, or mean, of what counts of `deltas`. A value that is not finite stays one, even uncounted."""
    total = torch.zeros_like(deltas[0].values)
    for delta, mask in zip(deltas, chosen.counted, strict=True):
        total.add_(delta.values * mask, alpha=delta.weight * combine.scale)
    return total if chosen.count is None else total.div_(chosen.count)


def find_thresholds(
    numel: int, combination: Combination, counted: Callable[[tuple[int, ...] | None], Tensor]
) -> tuple[int, ...]:
    """For each of the deltas of a tensor of `numel` elements the bits of its k-th largest magnitude, k = max(1,
    int(density * numel)).

    `counted` goes through all of the tensor's blocks and gives the sum of their `histograms`: first of the upper
    halves of the bits, then of the lower halves of those whose upper half is the given one.
    """
    k = max(1, int(combination.combine.share * numel))
    if k >= numel:
        return (0,) * len({part.adapter for part in combination.parts})
    places = [_place(counts, k) for counts in counted(None)]
    uppers = tuple(upper for upper, _ in places)
    lowers = [_place(counts, inside)[0] for counts, (_, inside) in zip(counted(uppers), places, strict=True)]
    return tuple(upper << 16 | lower for upper, lower in zip(uppers, lowers, strict=True))


def histograms(deltas: Sequence[Delta], uppers: tuple[int, ...] | None) -> Tensor:
    """How many magnitudes of each delta have each upper half of their 32 bits, or, of those with the upper half given
    in `uppers`, each lower half; int64 (deltas, halves)."""
    found = []
    for number, delta in enumerate(deltas):
        bits = magnitude_bits(delta.values).view(-1)
        if uppers is None:
            found.append(torch.bincount(bits >> 16, minlength=_UPPER_BINS))
        else:
            found.append(torch.bincount(bits[bits >> 16 == uppers[number]] & 0xFFFF, minlength=_LOWER_BINS))
    return torch.stack(found)


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of |values|, float32, as int32: in the order of the magnitudes, subnormals and infinity among them."""
    return values.abs().view(torch.int32)


def magnitude_of(bits: int) -> float:
    """The magnitude with these bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def draw(combine: Combine, *, adapter: int, name: str, block: int, numel: int) -> Tensor:
    """Which elements of a block chance keeps: bool (numel,), on the CPU and the same on every machine."""
    digest = hashlib.sha256(f"{combine.seed}\0{adapter}\0{name}\0{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    # bernoulli_ would leave the choice of generator to the build of torch.
    return torch.rand(numel, generator=generator) < combine.share


def _drawn(delta: Delta, combination: Combination, block: int) -> Tensor:
    values, combine = delta.values, combination.combine
    mask = draw(combine, adapter=delta.adapter, name=combination.name, block=block, numel=values.numel())
    return mask.view(values.shape).to(values.device)


def _place(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest element, and its number among the elements of that bin from the largest."""
    above = counts.flip(0).cumsum(0).flip(0)  # those in this bin and in higher ones
    place = int((above >= k).nonzero().max())
    return place, k - int(above[place] - counts[place])
