"""What a packed tensor of the output is made of: bitsandbytes' tensors, laid out to the byte before any value is known.

They are those that `checkpoint.formats` describes and that transformers loads together with bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distmerge.checkpoint.header import ITEMSIZE
from distmerge.numerics.packing4 import NESTED_BLOCKSIZE

_ALIGNMENT = 8
_MAX_OFFSET_DIGITS = 26  # of a float as JSON, with room
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor of the output's files."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedForm:
    """How a tensor is packed: in `kind` with one scale for `blocksize` elements, which with `double` are in 8 bits
    themselves; `fitted` scales make the error small, others are each block's largest magnitude."""

    kind: Literal["nf4", "fp4"]
    blocksize: int
    double: bool
    fitted: bool

    def num_blocks(self, numel: int) -> int:
        """How many scales `numel` elements have."""
        return -(-numel // self.blocksize)

    def parts(self, weight: str, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        """The tensors that `weight` of `shape`, whose floats are `dtype`, is packed in, in the order of their bytes.

        The codes are the last, so that what is before them is aligned; the state is JSON and filled up with blanks,
        so that a multiple of 8 bytes follows from shapes alone.
        """
        numel = math.prod(shape)
        num_blocks = self.num_blocks(numel)
        before = [Part(name=f"{weight}.quant_map", dtype="F32", shape=(16,))]
        if self.double:
            count = -(-num_blocks // NESTED_BLOCKSIZE)
            before.append(Part(name=f"{weight}.nested_quant_map", dtype="F32", shape=(256,)))
            before.append(Part(name=f"{weight}.nested_absmax", dtype="F32", shape=(count,)))
        before.append(Part(name=f"{weight}.absmax", dtype="U8" if self.double else "F32", shape=(num_blocks,)))
        codes = Part(name=weight, dtype="U8", shape=(-(-numel // 2), 1))
        state_nbytes = len(self._state(shape, dtype, 0.0)) + _MAX_OFFSET_DIGITS
        state_nbytes += -(sum(part.nbytes for part in before) + state_nbytes + codes.nbytes) % _ALIGNMENT
        state = Part(name=f"{weight}.quant_state.bitsandbytes__{self.kind}", dtype="U8", shape=(state_nbytes,))
        return (*before, state, codes)

    def state(self, shape: tuple[int, ...], dtype: str, offset: float, nbytes: int) -> bytes:
        """The quantization state as JSON of `nbytes` bytes; `offset` is what was taken off the scales of `double`."""
        return self._state(shape, dtype, offset).ljust(nbytes)

    def _state(self, shape: tuple[int, ...], dtype: str, offset: float) -> bytes:
        state: dict[str, object] = {"quant_type": self.kind, "blocksize": self.blocksize}
        state |= {"dtype": _DTYPES[dtype], "shape": list(shape)}
        if self.double:
            state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(state).encode()


def quantization_config(form: PackedForm, *, compute_dtype: str, skipped: Sequence[str] | None) -> dict[str, Any]:
    """What config.json says of an output packed as `form`, but for the modules `skipped`; transformers'
    BitsAndBytesConfig."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": form.kind,
        "bnb_4bit_use_double_quant": form.double,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped if skipped is None else list(skipped),
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def scratch_nbytes(form: PackedForm, numel: int) -> int:
    """Bytes that measuring or packing a block of `numel` elements takes at most, beside the buffers."""
    return (80 if form.fitted else 40) * numel


def scales_nbytes(form: PackedForm, numel: int) -> int:
    """Bytes that the scales of a tensor of `numel` elements take while it is packed: measured, nested, read back."""
    return (120 if form.fitted else 40) * form.num_blocks(numel)


def dtype_name(dtype: str) -> str:
    """The name that bitsandbytes and transformers give to a float dtype of safetensors."""
    return _DTYPES[dtype]
