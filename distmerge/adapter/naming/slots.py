"""Where a model's parameter lies in a checkpoint: boxes of the parameter, each a tensor of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A tensor `name` that holds a box of a parameter: from `starts`, of `sizes`, one entry for each dimension of the
    parameter. `order` lists the parameter's dimensions in the order in which the tensor has them; a dimension that it
    leaves out has size 1 in the box."""

    name: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @staticmethod
    def whole(name: str, shape: tuple[int, ...]) -> Slot:
        """The tensor that is the parameter."""
        return Slot(name=name, starts=(0,) * len(shape), sizes=shape, order=tuple(range(len(shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's own shape."""
        return tuple(self.sizes[dim] for dim in self.order)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: Slot) -> tuple[tuple[int, int], ...] | None:
        """The box that two slots of one parameter share, as [first, last) for each of its dimensions; None if none."""
        if self.starts == other.starts and self.sizes == other.sizes and 0 not in self.sizes:
            return tuple((start, start + size) for start, size in zip(self.starts, self.sizes, strict=True))
        box = []
        for start, size, other_start, other_size in zip(
            self.starts, self.sizes, other.starts, other.sizes, strict=True
        ):
            first, last = max(start, other_start), min(start + size, other_start + other_size)
            if first >= last:
                return None
            box.append((first, last))
        return tuple(box)

    def inside(self, box: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """A box of the parameter in this tensor's own dimensions and numbers."""
        return tuple((box[dim][0] - self.starts[dim], box[dim][1] - self.starts[dim]) for dim in self.order)
