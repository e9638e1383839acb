"""Parts of saved tensors: every rearrangement that strides can express, without reading a byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from distmerge.checkpoint.header import ITEMSIZE, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Elements of a tensor in an order of their own: `offset`, `size` and `stride` count elements, as in
    `torch.as_strided`."""

    spec: TensorSpec
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def whole(spec: TensorSpec) -> View:
        """All of `spec`, as it is."""
        return View(spec=spec, offset=0, size=spec.shape, stride=contiguous_stride(spec.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        """True if the view is the tensor in its own order, whatever its shape."""
        return not self.offset and _is_solid(self.size, self.stride) and self.numel == self.spec.numel

    @property
    def extent(self) -> tuple[int, int]:
        """The elements [first, last) of the tensor between which the view lies."""
        return self.offset, self.offset + _span(self.size, self.stride)

    @property
    def is_sparse(self) -> bool:
        """True if its elements lie so far apart that the tensor is better read whole, once for several views."""
        first, last = self.extent
        return last - first > 2 * self.numel

    @property
    def nbytes_read(self) -> int:
        """Bytes that reading the view takes."""
        first, last = self.extent
        return self.spec.nbytes if self.is_sparse else (last - first) * ITEMSIZE[self.spec.dtype]

    def narrow(self, dim: int, start: int, length: int) -> View:
        """Entries [start, start + length) of dimension `dim`."""
        if not 0 <= start <= start + length <= self.size[dim]:
            raise ValueError(f"[{start}, {start + length}) is outside of {self.size[dim]}")
        size = (*self.size[:dim], length, *self.size[dim + 1 :])
        return View(spec=self.spec, offset=self.offset + start * self.stride[dim], size=size, stride=self.stride)

    def permute(self, *dims: int) -> View:
        """The dimensions in another order."""
        if sorted(dims) != list(range(len(self.size))):
            raise ValueError(f"{dims} is no order of {len(self.size)} dimensions")
        size, stride = tuple(self.size[d] for d in dims), tuple(self.stride[d] for d in dims)
        return View(spec=self.spec, offset=self.offset, size=size, stride=stride)

    def stacked(self) -> View:
        """The view as the only entry of a new first dimension."""
        return View(spec=self.spec, offset=self.offset, size=(1, *self.size), stride=(0, *self.stride))

    def unflatten(self, dim: int, *sizes: int) -> View:
        """Dimension `dim` as several, the last one running fastest."""
        if math.prod(sizes) != self.size[dim]:
            raise ValueError(f"{self.size[dim]} entries do not make {sizes}")
        inner = tuple(step * self.stride[dim] for step in contiguous_stride(sizes))
        size = (*self.size[:dim], *sizes, *self.size[dim + 1 :])
        stride = (*self.stride[:dim], *inner, *self.stride[dim + 1 :])
        return View(spec=self.spec, offset=self.offset, size=size, stride=stride)


# The sizes and strides of an adapter's tensors are few, however many tensors it has.


@lru_cache(maxsize=4096)
def _span(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie between the first and the last, both counted."""
    if not math.prod(size):
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))


@lru_cache(maxsize=4096)
def _is_solid(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True if the elements follow one another in their own order."""
    expected = contiguous_stride(size)
    return all(length == 1 or a == b for length, a, b in zip(size, stride, expected, strict=True))


@lru_cache(maxsize=4096)
def contiguous_stride(size: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor of `size` whose last dimension runs fastest."""
    return tuple(math.prod(size[dim + 1 :]) for dim in range(len(size)))
