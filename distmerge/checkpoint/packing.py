"""How a checkpoint may hold a tensor: plain, or packed in few bits with companions that turn it back into floats."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distmerge.checkpoint.header import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """bitsandbytes' 4 bits: `quant_map[code] * absmax[element // blocksize]`, then `dtype`; two codes a byte, high
    nibble first, over the flattened rows.

    `absmax` is float, shape (num_blocks,); or (in / blocksize, out), as bitsandbytes writes it after a forward
    pass on the CPU; or uint8, to be read as `nested_quant_map[absmax] * nested_absmax[i // nested_blocksize] +
    nested_offset`. `state` holds what is not a tensor, as JSON.
    """

    kind: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
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

    def data_nbytes(self, numel: int) -> int:
        """Bytes that `numel` elements in a row take of the weight's data, at most."""
        return numel // 2 + 1


Packing = FourBit


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
        return math.prod(self.shape)

    @property
    def nbytes_read(self) -> int:
        """Bytes on disk, companions included."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the checkpoint that this one is made of."""
        return (self.data, *(self.packing.companions if self.packing else ()))
