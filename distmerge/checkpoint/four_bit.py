"""Weights that bitsandbytes packed in 4 bits, known by their quantization states.

A packed linear `P` of shape (out, in) is stored as `P.weight` (two codes a byte, high nibble first, over the
flattened rows), `P.weight.absmax`, `P.weight.quant_map`, with double quantization `P.weight.nested_absmax` and
`P.weight.nested_quant_map`, and `P.weight.quant_state.bitsandbytes__nf4` or `__fp4`, JSON as bytes
(bitsandbytes, functional.QuantState.as_dict). The companions may lie in other files than the weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distmerge.checkpoint.header import TensorSpec
from distmerge.checkpoint.packing import FourBit, Packing
from distmerge.errors import InputError, listing, shown
from distmerge.storage.strict_json import parse_object

_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
_COMPANION = re.compile(r".+\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MAX_STATE_NBYTES = 1 << 16


def find_four_bit(
    specs: dict[str, TensorSpec], read: Callable[[TensorSpec], bytes], is_transposed: Callable[[str], bool]
) -> dict[str, Packing]:
    """The packings of the 4-bit weights among `specs`, by the weights' names; `read` gives the bytes of a (small)
    quantization state, and `is_transposed` says of which weights the transpose was packed.

    Raises InputError for a quantization state that is incomplete or contradicts the shapes.
    """
    packings: dict[str, Packing] = {}
    for name, spec in specs.items():
        if "quant_state" in name and (match := _STATE.fullmatch(name)):
            weight = match["weight"]
            if weight not in specs:
                raise InputError("the quantization state has no weight", where=name)
            if weight in packings:
                raise InputError("has two quantization states", where=weight)
            packing = _packing(weight, match["kind"], spec, specs, _read_state(spec, read))
            if is_transposed(weight) and len(packing.shape) == 2:
                packing = replace(packing, shape=packing.shape[::-1], transposed=True)
            packings[weight] = packing
    used = {part.name for packing in packings.values() for part in packing.companions}
    orphans = [name for name in specs if name not in used and _COMPANION.fullmatch(name)]
    if orphans:
        raise InputError(
            f"quantization companions without a quantization state: {listing(orphans)}",
            where=orphans[0],
            hint="the checkpoint is incomplete; save or download it again",
        )
    return packings


def _read_state(spec: TensorSpec, read: Callable[[TensorSpec], bytes]) -> dict[str, Any]:
    if spec.nbytes > _MAX_STATE_NBYTES:
        raise InputError(f"the quantization state has {spec.nbytes} bytes", where=spec.name)
    return parse_object(read(spec), spec.name)


def _packing(weight: str, kind: str, spec: TensorSpec, specs: dict[str, TensorSpec], state: dict[str, Any]) -> FourBit:
    def companion(tail: str) -> TensorSpec:
        found = specs.get(f"{weight}.{tail}")
        if found is None:
            raise InputError(f"the quantization state is incomplete: {weight}.{tail} is missing", where=weight)
        return found

    nested = "nested_blocksize" in state or f"{weight}.nested_absmax" in specs
    blocksize, shape = state.get("blocksize"), state.get("shape")
    if type(blocksize) is not int or not 1 <= blocksize <= 1 << 20:
        raise InputError(f"blocksize {shown(blocksize)} is not a block size", where=weight)
    if not isinstance(shape, list) or not shape or not all(type(dim) is int and 0 < dim < 1 << 40 for dim in shape):
        raise InputError(f"shape {shown(shape)} in the quantization state is not a shape", where=weight)
    if not isinstance(state.get("dtype"), str) or state["dtype"] not in _DTYPES:
        raise InputError(f"dtype {shown(state.get('dtype'))} in the quantization state is not supported", where=weight)
    if state.get("quant_type") != kind:
        raise InputError(f"quant_type {shown(state.get('quant_type'))} contradicts the key's {kind!r}", where=weight)
    nested_blocksize, nested_offset = state.get("nested_blocksize", 0), state.get("nested_offset", 0.0)
    if nested and (type(nested_blocksize) is not int or not 1 <= nested_blocksize <= 1 << 20):
        raise InputError(f"nested_blocksize {shown(nested_blocksize)} is not a block size", where=weight)
    if type(nested_offset) not in (int, float) or not abs(nested_offset) < 1e30:
        raise InputError(f"nested_offset {shown(nested_offset)} is not a finite number", where=weight)
    packing = FourBit(
        kind=kind,
        blocksize=blocksize,
        dtype=_DTYPES[state["dtype"]],
        shape=tuple(shape),
        transposed=False,
        absmax=companion("absmax"),
        quant_map=companion("quant_map"),
        nested_absmax=companion("nested_absmax") if nested else None,
        nested_quant_map=companion("nested_quant_map") if nested else None,
        nested_blocksize=nested_blocksize,
        nested_offset=float(nested_offset),
        state=spec,
    )
    _check_shapes(weight, specs[weight], packing)
    return packing


def _check_shapes(weight: str, data: TensorSpec, packing: FourBit) -> None:
    num_blocks, absmax = packing.num_blocks, packing.absmax

    def expect(ok: bool, spec: TensorSpec, expected: str) -> None:
        if not ok:
            raise InputError(f"expected {expected}, got {spec.dtype} {spec.shape}", where=spec.name)

    nbytes = -(-math.prod(packing.shape) // 2)
    expect(nbytes <= data.nbytes < nbytes + 8, data, f"{nbytes} bytes for {packing.shape} in 4 bits")
    expect(packing.quant_map.shape == (16,) and packing.quant_map.dtype == "F32", packing.quant_map, "F32 (16,)")
    if packing.nested_absmax is not None and packing.nested_quant_map is not None:
        expect(absmax.dtype == "U8" and absmax.shape == (num_blocks,), absmax, f"U8 ({num_blocks},)")
        nested, table = packing.nested_absmax, packing.nested_quant_map
        count = -(-num_blocks // packing.nested_blocksize)
        expect(nested.dtype == "F32" and nested.shape == (count,), nested, f"F32 ({count},)")
        expect(table.dtype == "F32" and table.shape == (256,), table, "F32 (256,)")
    else:
        transposed = (packing.shape[-1] // packing.blocksize, packing.shape[0])
        whole = len(packing.shape) == 2 and packing.shape[1] % packing.blocksize == 0
        ok = absmax.shape == (num_blocks,) or (whole and absmax.shape == transposed)
        expect(ok and absmax.dtype in ("F32", "F16", "BF16"), absmax, f"floats ({num_blocks},)")
