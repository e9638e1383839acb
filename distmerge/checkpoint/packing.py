"""How a checkpoint may hold a tensor: plain, or packed in few bits with companions that turn it back into floats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distmerge.checkpoint.header import ITEMSIZE, TensorSpec

_SPAN_NUMEL = 1 << 19
ROUNDED_NUMEL = 1 << 16  # elements that are rounded through 4 bits at once, whose temporaries are small

# Temporaries of looking for values that are not finite, for each element of a block; in a block of the ordinary size
# they are not worth counting.
_CHECKED_NBYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """bitsandbytes' 4 bits: `quant_map[code] * absmax[element // blocksize]`, then `dtype`; two codes a byte, high
    nibble first, over the flattened rows.

    `absmax` is float, shape (num_blocks,); or (in / blocksize, out), as bitsandbytes writes it after a forward
    pass on the CPU; or uint8, to be read as `nested_quant_map[absmax] * nested_absmax[i // nested_blocksize] +
    nested_offset`. `state` holds what is not a tensor, as JSON. `transposed` says that what is packed is the transpose.
    """

    kind: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    absmax: TensorSpec
    quant_map: TensorSpec
    nested_absmax: TensorSpec | None
    nested_quant_map: TensorSpec | None
    nested_blocksize: int
    nested_offset: float
    state: TensorSpec

    @property
    def num_blocks(self) -> int:
        return -(-math.prod(self.shape) // self.blocksize)

    @property
    def companions(self) -> tuple[TensorSpec, ...]:
        """The tensors of the checkpoint that lie beside the weight."""
        nested = [part for part in (self.nested_absmax, self.nested_quant_map) if part is not None]
        return (self.absmax, self.quant_map, *nested, self.state)

    @property
    def block_numel(self) -> int:
        """Elements that have to be read at once: a whole matrix where it is stored transposed."""
        return math.prod(self.shape[-2:]) if self.transposed else 1

    def data_nbytes(self, numel: int) -> int:
        """Bytes that `numel` elements in a row take of the weight's data, at most."""
        return numel // 2 + 1

    def scratch_nbytes(self, numel: int) -> int:
        """Bytes that dequantizing and checking `numel` elements takes beside the lane's buffers, at most."""
        return _CHECKED_NBYTES * numel if self.transposed else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Numbers of one byte, or 4-bit floats two a byte (low nibble first), times the scale of their block: `(q - zero) *
    scale`, then `factor` (1 but for bitsandbytes), in float32, then `dtype`.

    Matrices of (rows, cols), the last two dimensions as stored, are cut into blocks of `block`; the last ones need not
    be full. `scale` holds one number for each block, row by row and matrix by matrix; uint8 is the exponent of a power
    of two, less 127. `others` are tensors that have a meaning only beside the packed weight (scales of activations).
    `transposed` says that `shape` has the last two dimensions the other way round than the file.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    block: tuple[int, int]
    halves: bool
    factor: float
    scale: TensorSpec
    zero: TensorSpec | None
    others: tuple[TensorSpec, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one matrix as stored."""
        rows, cols = self.shape[-2:]
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks a matrix has below and beside one another."""
        return -(-self.matrix[0] // self.block[0]), -(-self.matrix[1] // self.block[1])

    @property
    def companions(self) -> tuple[TensorSpec, ...]:
        """The tensors of the checkpoint that lie beside the weight."""
        return (self.scale, *((self.zero,) if self.zero else ()), *self.others)

    @property
    def block_numel(self) -> int:
        """Elements that have to be read at once: a whole matrix where it is stored transposed."""
        return math.prod(self.matrix) if self.transposed else 1

    def data_nbytes(self, numel: int) -> int:
        """Bytes that `numel` elements in a row take of the weight's data, at most."""
        return numel // 2 + 1 if self.halves else numel + 1

    def scratch_nbytes(self, numel: int) -> int:
        """Bytes of the scales, and zeros, of `numel` elements in a row, as stored and in float32, and of checking the
        elements, at most."""
        rows = (numel // max(self.matrix[1], 1) + 2) // self.block[0] + 2
        scales = 13 * rows * self.grid[1] * (1 if self.zero is None else 2)
        return scales + (_CHECKED_NBYTES * numel if self.transposed else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """What another method packed, which is known by its names and cannot be dequantized: only kept as it is. `dtype`
    and `shape` are those of its first tensor, not of the weight."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[TensorSpec, ...]

    @property
    def companions(self) -> tuple[TensorSpec, ...]:
        """The other tensors of the checkpoint that it is made of."""
        return self.parts

    @property
    def block_numel(self) -> int:
        return 1

    def data_nbytes(self, numel: int) -> int:
        raise ValueError(f"{self.kind} is not read")

    def scratch_nbytes(self, numel: int) -> int:
        raise ValueError(f"{self.kind} is not read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Plain floats that are read as what bitsandbytes makes of them in 4 bits of `kind`: packed in blocks of
    `blocksize` elements, with `double` quantization or not, unpacked to their own `dtype`, rounded to `compute_dtype`.

    `transposed` says that the transpose is packed (transformers' Conv1D). The checkpoint holds nothing of it.
    """

    kind: str
    blocksize: int
    double: bool
    compute_dtype: str
    transposed: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    @property
    def companions(self) -> tuple[TensorSpec, ...]:
        return ()

    @property
    def block_numel(self) -> int:
        """Elements that have to be read at once: a whole matrix where the transpose is packed."""
        return self.numel if self.transposed else 1

    def spans(self) -> Iterator[tuple[int, int]]:
        """Elements [first, last), whole blocks, by which the scales of the tensor are found."""
        step = max(self.numel, 1) if self.transposed else _SPAN_NUMEL
        return ((first, min(first + step, self.numel)) for first in range(0, self.numel, step))

    def around(self, first: int, last: int) -> tuple[int, int]:
        """The elements of all blocks that elements [first, last) lie in: what has to be read for them."""
        size = self.blocksize
        return first - first % size, min(-(-last // size) * size, self.numel)

    def data_nbytes(self, numel: int) -> int:
        """Bytes that are read for `numel` elements in a row, at most."""
        return (numel + 2 * self.blocksize) * ITEMSIZE[self.dtype]

    def scratch_nbytes(self, numel: int) -> int:
        """Bytes that packing and unpacking `numel` elements takes beside the lane's buffers, at most."""
        # Up to 12 an element are in use at once; the C allocator keeps some of what was freed.
        return 20 * (numel + 2 * self.blocksize + max(ROUNDED_NUMEL, self.blocksize))

    @property
    def kept_nbytes(self) -> int:
        """Bytes that are kept of the whole tensor: with double quantization its scales in 8 bits."""
        return self.num_blocks * 33 // 32 + 4096 if self.double else 0

    @property
    def learning_nbytes(self) -> int:
        """Bytes that finding these takes at most."""
        return 10 * self.num_blocks + (4 << 20) if self.double else 0


Packing = FourBit | Scaled | Foreign | Simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor as the base's files hold it, with its companions; `dtype` and `shape` are those of its dense form."""

    data: TensorSpec
    packing: Packing | None

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def dtype(self) -> str:
        return self.packing.dtype if self.packing else self.data.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packing.shape if self.packing else self.data.shape

    @property
    def numel(self) -> int:
        return math.prod(self.packing.shape if self.packing else self.data.shape)

    @property
    def nbytes_read(self) -> int:
        """Bytes on disk, companions included."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the checkpoint that this one is made of."""
        return (self.data, *(self.packing.companions if self.packing else ()))
