"""Weights stored as numbers of one byte, or 4-bit floats, beside the scales of their blocks.

`P.weight` has a companion that tells its format: `P.SCB` (bitsandbytes int8: one scale for each row, as the largest
magnitude of 127 steps), `P.weight_scale_inv` (FP8 of DeepSeek-V3 and others; it is multiplied with, in spite of its
name), `P.weight_scale` (FBGEMM, compressed-tensors). Fused experts `P` have `P_scale_inv` or `P_scale`; those of
gpt-oss are `P_blocks` and `P_scales`, stored (experts, out, in) and dense (experts, in, out) under the name `P`
(transformers.integrations: finegrained_fp8, mxfp4, bitsandbytes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from distmerge.checkpoint.header import TensorSpec
from distmerge.checkpoint.packing import Packing, Scaled
from distmerge.checkpoint.quantization import Quantization
from distmerge.errors import InputError, printable

_PER_127TH = 7.874015718698502e-3  # bitsandbytes.functional.int8_vectorwise_dequant
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_BYTES = (*_FLOAT8, "I8")
_TAILS = ("_scale_inv", "_scale")
_ALIASES = (".scale", ".qscale_weight")  # DeepSeek-V4, Mistral Large 4
# Beside a weight, for its inputs and outputs; of no use once the weight is dense.
_BESIDE = (
    *("input_scale", "input_zero_point", "input_scale_ub", "input_global_scale", "activation_scale"),
    *("output_scale", "output_zero_point", "weight_g_idx", "weight_shape"),
)
_ACTIVATION = "_activation_scale"
_GROUP = 32  # elements that share a scale in OCP's formats
_ROW_LAYOUT = 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found: packings by the name of the dense weight, and the name on disk of each one's data."""

    packings: dict[str, Packing]
    data: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Finder:
    """Finds scaled weights among `specs`. `dtype` is that of dense weights, `read` gives the bytes of a small tensor,
    `is_transposed` says of which weights the transpose was packed."""

    specs: dict[str, TensorSpec]
    quantization: Quantization | None
    dtype: str
    read: Callable[[TensorSpec], bytes]
    is_transposed: Callable[[str], bool]
    _known_blocks: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def _others(self) -> dict[str, tuple[TensorSpec, ...]]:
        """What lies beside each weight for its inputs and outputs, in the order of `_BESIDE`."""
        found: dict[str, dict[int, TensorSpec]] = {}
        for name, spec in self.specs.items():
            module, _, leaf = name.rpartition(".")
            if leaf in _BESIDE:
                found.setdefault(f"{module}.weight", {})[_BESIDE.index(leaf)] = spec
            elif leaf.endswith(_ACTIVATION):
                found.setdefault(name.removesuffix(_ACTIVATION), {})[len(_BESIDE)] = spec
        return {weight: tuple(beside[place] for place in sorted(beside)) for weight, beside in found.items()}

    def find(self) -> Found:
        """All of them. Raises InputError, naming tensors, for companions that are missing, that have another dtype or
        shape than their weight's, and for weights that the configuration says are packed and which have no scale."""
        packings: dict[str, Packing] = {}
        data: dict[str, str] = {}
        for name, spec in self.specs.items():
            found = None
            if name.endswith(".SCB"):
                weight = f"{name.removesuffix('SCB')}weight"
                found = self._int8(weight, spec)
            elif name.endswith("_blocks") and spec.dtype == "U8" and f"{name.removesuffix('_blocks')}_scales" in self:
                weight = name.removesuffix("_blocks")
                found = self._blocks(weight, spec)
            elif spec.dtype in _BYTES and (scale := self._scale_of(name)) is not None:
                weight = name
                found = self._scaled(spec, scale)
            if found is not None:
                packings[weight] = found
                data[weight] = f"{weight}_blocks" if f"{weight}_blocks" in self else weight
        self._check_rest(packings, set(data.values()))
        return Found(packings=packings, data=data)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def _int8(self, weight: str, scale: TensorSpec) -> Scaled:
        spec = self.specs.get(weight)
        if spec is None:
            raise InputError("the scales of bitsandbytes int8 have no weight", where=scale.name)
        if spec.dtype != "I8" or len(spec.shape) != 2 or not spec.numel:
            raise InputError(f"expected I8 (out, in) with {scale.name!r}, got {spec.dtype} {spec.shape}", where=weight)
        if scale.dtype not in ("F32", "F16", "BF16") or scale.numel != spec.shape[0]:
            raise _unlike(scale, f"floats ({spec.shape[0]},)")
        layout = self.specs.get(f"{weight}_format")
        if layout is not None and (layout.dtype != "U8" or layout.numel != 1):
            raise _unlike(layout, "U8 ()")
        if layout is not None and (number := self.read(layout)[0]) != _ROW_LAYOUT:
            raise InputError(
                f"the int8 layout {number} is not supported, only rows ({_ROW_LAYOUT})",
                where=layout.name,
                hint="save the model again with a bitsandbytes that writes rows (0.45 or newer)",
            )
        others = (layout,) if layout is not None else ()
        return self._packing("int8", spec, scale, (1, spec.shape[1]), factor=_PER_127TH, others=others)

    def _blocks(self, weight: str, spec: TensorSpec) -> Scaled:
        scale = self.specs[f"{weight}_scales"]
        if weight in self:
            raise InputError(f"is stored twice, plain and as {spec.name!r}", where=weight)
        if len(spec.shape) != 4 or spec.shape[-1] != _GROUP // 2 or not spec.numel:
            raise _unlike(spec, f"U8 (experts, out, in / {_GROUP}, {_GROUP // 2})")
        if scale.dtype != "U8" or scale.shape != spec.shape[:-1]:
            raise _unlike(scale, f"U8 {spec.shape[:-1]}")
        experts, out, groups, _ = spec.shape
        return Scaled(
            kind="mxfp4",
            dtype=self.dtype,
            shape=(experts, groups * _GROUP, out),
            transposed=True,
            block=(1, _GROUP),
            halves=True,
            factor=1.0,
            scale=scale,
            zero=None,
            others=(),
        )

    def _scale_of(self, name: str) -> TensorSpec | None:
        """The scales of the weight `name`. Raises InputError where there are two."""
        module = name.removesuffix(".weight")
        aliases = [f"{module}{tail}" for tail in _ALIASES] if module != name else []
        found = [self.specs[known] for known in (*(f"{name}{tail}" for tail in _TAILS), *aliases) if known in self]
        if len(found) > 1:
            raise InputError(f"has two scales: {found[0].name!r} and {found[1].name!r}", where=name)
        return found[0] if found else None

    def _scaled(self, spec: TensorSpec, scale: TensorSpec) -> Scaled:
        if scale.dtype not in _SCALES:
            raise _unlike(scale, f"scales in {', '.join(_SCALES)}")
        if len(spec.shape) not in (2, 3) or not spec.numel:
            raise InputError(f"expected a matrix, or one for each expert, got {spec.shape}", where=spec.name)
        method = self.quantization.kinds if self.quantization else ()
        halves = spec.dtype == "I8" and "fp4_e2m1" in method  # two 4-bit floats a byte
        block = (1, _GROUP) if halves else self._block(spec, scale)
        zero = self.specs.get(f"{spec.name}_zero_point")
        if zero is not None and (zero.dtype != "I8" or spec.dtype != "I8" or zero.shape != scale.shape):
            raise _unlike(zero, f"I8 {scale.shape} beside I8 weights")
        if f"{spec.name}_g_idx" in self:
            raise InputError(
                "its groups are in the order of activations, which is not supported",
                where=spec.name,
                hint="merge into the 16-bit base instead",
            )
        others = self._others.get(spec.name, ())
        kind = "fp4_e2m1" if halves else "int8_scaled" if spec.dtype == "I8" else "fp8"
        return self._packing(kind, spec, scale, block, zero=zero, others=others, halves=halves)

    def _block(self, spec: TensorSpec, scale: TensorSpec) -> tuple[int, int]:
        """The rows and columns that one of the scales stands for, by the shape of their grid."""
        shapes = spec.shape, scale.shape
        if (block := self._known_blocks.get(shapes)) is None:
            block = self._known_blocks[shapes] = self._find_block(spec, scale)
        return block

    def _find_block(self, spec: TensorSpec, scale: TensorSpec) -> tuple[int, int]:
        *stack, rows, cols = spec.shape
        known = dict.fromkeys(self.quantization.blocks if self.quantization else ())
        if scale.numel == 1 and math.prod(stack) == 1:
            return rows, cols
        # One scale for each matrix, for each row, or for each column; then the blocks that the configuration names.
        shapes: dict[tuple[int, int], list[tuple[int, ...]]] = {
            (rows, cols): [(1, 1), (1,), ()],
            (1, cols): [(rows, 1), (rows,)],
            (rows, 1): [(1, cols)],
        }
        for block, grids in shapes.items():
            if scale.shape in [(*stack, *grid) for grid in grids]:
                return block
        fitting = [b for b in known if scale.shape == (*stack, -(-rows // b[0]), -(-cols // b[1]))]
        if len({(min(b[0], rows), min(b[1], cols)) for b in fitting}) > 1:
            raise InputError(f"fits several blocks: {fitting}", where=scale.name)
        if fitting:
            return fitting[0]
        blocks = " or ".join(f"{block[0]} x {block[1]}" for block in known)
        expected = f"one scale or {rows}" + (f", or one for each block of {blocks}" if known else "")
        raise _unlike(scale, f"{expected} for {spec.shape}")

    def _packing(
        self,
        kind: str,
        spec: TensorSpec,
        scale: TensorSpec,
        block: tuple[int, int],
        *,
        others: tuple[TensorSpec, ...],
        factor: float = 1.0,
        zero: TensorSpec | None = None,
        halves: bool = False,
    ) -> Scaled:
        *stack, rows, cols = spec.shape
        transposed = self.is_transposed(spec.name)
        shape = (*stack, rows, 2 * cols if halves else cols)
        found = Scaled(
            kind=kind,
            dtype=self.dtype,
            shape=(*stack, shape[-1], rows) if transposed else shape,
            transposed=transposed,
            block=block,
            halves=halves,
            factor=factor,
            scale=scale,
            zero=zero,
            others=others,
        )
        if scale.numel != math.prod(found.grid) * math.prod(stack):
            raise _unlike(scale, f"{found.grid} scales for {shape}")
        return found

    def _check_rest(self, packings: dict[str, Packing], data: set[str]) -> None:
        """What is left over and cannot be plain. Raises InputError."""
        used = data | {part.name for packing in packings.values() for part in packing.companions}
        kinds = self.quantization.kinds if self.quantization else ()
        for name, spec in self.specs.items():
            if name in used:
                continue
            if name.endswith((".weight_scale_inv", "_scale_inv", ".weight_format")):
                raise InputError(
                    "there are scales, but no weight in 8 bits that they belong to",
                    where=name,
                    hint="the checkpoint is incomplete; save or download it again",
                )
            weight = _scaled_name(name)
            if kinds and weight is not None and weight in self and weight not in packings:
                stored = self.specs[weight]
                raise InputError(f"has the scales {printable(name)!r}, but is stored as {stored.dtype}", where=weight)
            if kinds and (spec.dtype in _FLOAT8 or (spec.dtype == "I8" and name.endswith(".weight"))):
                raise InputError(
                    f"is stored as {spec.dtype} and has no scales",
                    where=name,
                    hint="the checkpoint is incomplete; save or download it again",
                )
            if "mxfp4" in kinds and spec.dtype == "U8" and name.endswith(("_blocks", "_scales")):
                twin = "_scales" if name.endswith("_blocks") else "_blocks"
                raise InputError(f"has no {twin}", where=name, hint="the checkpoint is incomplete; download it again")


def _scaled_name(name: str) -> str | None:
    """The weight that scales of this name would belong to."""
    return next((name.removesuffix(tail) for tail in _TAILS if name.endswith(f".weight{tail}")), None)


def _unlike(spec: TensorSpec, expected: str) -> InputError:
    return InputError(f"expected {expected}, got {spec.dtype} {spec.shape}", where=spec.name)
