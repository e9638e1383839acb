"""How a change agrees with the one it should be: by which multiple of it, and how much is left over; in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Sums over elements, of `change` (what was done), `delta` (what should have been) and `room` (the most that
    rounding moves an element by): their squares, the product of the first two, and how many elements there are, how
    many of them were not changed, and how many are not finite and stand in no sum."""

    numel: int = 0
    num_unchanged: int = 0
    num_not_finite: int = 0
    change_squared: float = 0.0
    delta_squared: float = 0.0
    room_squared: float = 0.0
    product: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            numel=self.numel + other.numel,
            num_unchanged=self.num_unchanged + other.num_unchanged,
            num_not_finite=self.num_not_finite + other.num_not_finite,
            change_squared=self.change_squared + other.change_squared,
            delta_squared=self.delta_squared + other.delta_squared,
            room_squared=self.room_squared + other.room_squared,
            product=self.product + other.product,
        )

    @property
    def coefficient(self) -> float:
        """The multiple of the delta that comes nearest to the change: the projection of the one on the other."""
        return self.product / self.delta_squared if self.delta_squared else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between change and delta; 0 if one of them is 0."""
        lengths = math.sqrt(self.change_squared * self.delta_squared)
        return self.product / lengths if lengths else 0.0

    @property
    def is_multiple(self) -> bool:
        """True if the change is that multiple of the delta and nothing else: what is left over is no more than
        rounding makes of it, and the change goes the delta's way rather than another."""
        left = self.change_squared - self.coefficient * self.product
        return abs(self.cosine) > 0.5 and left <= max(self.room_squared, 1e-6 * self.change_squared)


def agreement(change: Tensor, delta: Tensor, room: Tensor) -> Agreement:
    """The agreement of the elements of `change`, `delta` and `room`, float64 of one shape."""
    finite = torch.isfinite(change)
    bad = int(change.numel() - finite.sum())
    if bad:
        change, delta, room = change[finite], delta[finite], room[finite]
    change, delta, room = change.flatten(), delta.flatten(), room.flatten()
    return Agreement(
        numel=change.numel(),
        num_unchanged=int((change == 0).sum()),
        num_not_finite=bad,
        change_squared=float(change @ change),
        delta_squared=float(delta @ delta),
        room_squared=float(room @ room),
        product=float(change @ delta),
    )
