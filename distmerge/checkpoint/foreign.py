"""Weights packed by methods that are only recognised: GPTQ, AWQ, AQLM, HQQ, quanto, packed compressed-tensors, ..."""

from __future__ import annotations

from distmerge.checkpoint.header import TensorSpec
from distmerge.checkpoint.packing import Foreign
from distmerge.checkpoint.quantization import Quantization
from distmerge.errors import InputError

# The tensor of a linear that tells how it was packed, where the configuration does not.
SIGNS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors (packed integers or NVFP4)",
    "W_q": "HQQ",
    "codes": "AQLM",
    "weight._data": "quanto",
}
_LEAVES = {sign.rpartition(".")[2] for sign in SIGNS}
# Whole numbers that models have unpacked are of 64 bits.
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "F8_E4M3", "F8_E5M2")
HINT = "if the adapter changes none of them, --keep-quantized leaves them packed; else merge into the 16-bit base"


def find_foreign(
    specs: dict[str, TensorSpec], quantization: Quantization | None
) -> tuple[dict[str, Foreign], dict[str, str]]:
    """The weights among `specs` that cannot be dequantized, by the name that a dense weight would have, and the name on
    disk of each one's first tensor.

    Under a method that is not known every module is one which holds tensors of a packed dtype.
    """
    strange = quantization is not None and not quantization.is_known
    if not strange and not any(name.rpartition(".")[2] in _LEAVES for name in specs):
        return {}, {}
    modules: dict[str, list[str]] = {}
    for name in specs:
        modules.setdefault(_module(name), []).append(name)
    packings: dict[str, Foreign] = {}
    data: dict[str, str] = {}
    for module, names in modules.items():
        inside = [name for name in names if name != f"{module}.bias"]
        sign = next((sign for sign in SIGNS if _is_packed(specs.get(f"{module}.{sign}"))), None)
        packed = [name for name in inside if _is_packed(specs[name])] if strange else []
        if sign is None and not packed:
            continue
        kind = quantization.shown if strange and quantization is not None else SIGNS[str(sign)]
        # A linear is one weight in several tensors; what holds several parameters has each with its companions.
        is_linear = sign is not None or any(name.startswith(f"{module}.weight") for name in inside)
        for first in [f"{module}.{sign}" if sign else packed[0]] if is_linear else packed:
            weight = f"{module}.weight" if is_linear else first
            parts = inside if is_linear else [name for name in inside if name.startswith(f"{first}_") or name == first]
            packings[weight] = Foreign(
                kind=kind,
                dtype=specs[first].dtype,
                shape=specs[first].shape,
                parts=tuple(specs[name] for name in parts if name != first),
            )
            data[weight] = first
    return packings, data


def _is_packed(spec: TensorSpec | None) -> bool:
    return spec is not None and spec.dtype in _PACKED


def _module(name: str) -> str:
    module = name.rpartition(".")[0]
    return module.removesuffix(".weight") if module.endswith(".weight") else module


def refusal(name: str, kind: str, *, quantize: bool = False) -> InputError:
    """The error for a weight that would have to be dequantized and cannot be; `quantize` if that is to pack it anew."""
    hint = f"leave out --quantize: {HINT}" if quantize else HINT
    return InputError(f"is packed by {kind}, which cannot be dequantized", where=name, hint=hint)
