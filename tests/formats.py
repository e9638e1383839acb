"""Packed checkpoints of every format but bitsandbytes' 4 bits: written by plain arithmetic, and read by other formulas
than distmerge's, from the formats' own descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.factories import load_folder, write_base

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT8: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def compressed(kind: str = "float", **weights: Any) -> dict[str, Any]:
    """A compressed-tensors section, `weights` beside the bits and the type."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": kind, "symmetric": True, **weights}}
    form = "float-quantized" if kind == "float" else "int-quantized"
    section = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {**section, "quantization_status": "compressed", "ignore": ["lm_head"]}


def noise(*shape: int, seed: int = 0, scale: float = 0.05) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """One scale for each element: those of ragged blocks are cut off."""
    rows, cols = shape[-2:]
    return scales.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :cols]


def cut(weight: Tensor, block: tuple[int, int], largest: float) -> Tensor:
    """The scale of each block: its largest magnitude as `largest`."""
    rows, cols = weight.shape[-2:]
    down, right = -(-rows // block[0]), -(-cols // block[1])
    padded = torch.zeros(*weight.shape[:-2], down * block[0], right * block[1])
    padded[..., :rows, :cols] = weight
    blocks = padded.unflatten(-2, (down, block[0])).unflatten(-1, (right, block[1]))
    return blocks.abs().amax((-3, -1)).clamp_min(1e-12) / largest


def exponents(scales: Tensor) -> Tensor:
    """`scales` as bytes that stand for powers of two, rounded up."""
    return (scales.log2().ceil() + 127).clamp(0, 254).to(torch.uint8)


def fp8(
    name: str,
    weight: Tensor,
    block: tuple[int, int] = (128, 128),
    *,
    scales: str = "F32",
    tail: str = "_scale_inv",
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> dict[str, Tensor]:
    """`weight` in FP8 by blocks, with scales of any of the dtypes that checkpoints have."""
    grid = cut(weight, block, torch.finfo(dtype).max)
    if scales in ("U8", "F8_E8M0"):
        stored = exponents(grid)
        wide = (stored.float() - 127).exp2()
        stored = stored.view(torch.float8_e8m0fnu) if scales == "F8_E8M0" else stored
    else:
        stored = grid.to({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[scales])
        wide = stored.float()
    limit = torch.finfo(dtype).max
    codes = (weight.float() / spread(wide, block, weight.shape)).clamp(-limit, limit).to(dtype)
    return {name: codes, f"{name}{tail}": stored}


def dense_fp8(tensors: dict[str, Tensor], name: str, block: tuple[int, int], *, tail: str = "_scale_inv") -> Tensor:
    """The weight in bfloat16: every element its own product in float32."""
    scales = tensors[f"{name}{tail}"]
    wide = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    weight = tensors[name]
    grid = wide.reshape(*weight.shape[:-2], -(-weight.shape[-2] // block[0]), -(-weight.shape[-1] // block[1]))
    return (weight.float() * spread(grid, block, weight.shape)).bfloat16()


def int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """`weight` as bitsandbytes stores it in 8 bits."""
    largest = weight.float().abs().amax(1)
    module = name.removesuffix("weight")
    codes = (weight.float() / largest[:, None] * 127).round().to(torch.int8)
    return {name: codes, f"{module}SCB": largest, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}


def dense_int8(tensors: dict[str, Tensor], name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    scales = tensors[f"{name.removesuffix('weight')}SCB"]
    return (tensors[name] * scales.view(-1, 1) * 7.874015718698502e-3).to(dtype)


def mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """`weight` (experts, in, out) as gpt-oss stores it: transposed, groups of 32 with a power of two."""
    stored = weight.float().mT.contiguous()
    groups = stored.unflatten(-1, (-1, 32))
    scales = exponents(groups.abs().amax(-1).clamp_min(1e-12) / 6)
    scaled = groups / (scales.float() - 127).exp2()[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    return {f"{name}_blocks": codes[..., 0::2] | codes[..., 1::2] << 4, f"{name}_scales": scales}


def dense_mxfp4(tensors: dict[str, Tensor], name: str) -> Tensor:
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
    wide = torch.ldexp(values, (scales.int() - 127)[..., None])
    return wide.flatten(-2).transpose(1, 2).contiguous().bfloat16()


def write(folder: Path, tensors: dict[str, Tensor], section: dict[str, Any] | None, **config: Any) -> Path:
    """A checkpoint whose configuration has the quantization `section`, in bfloat16."""
    sections = {"quantization_config": section} if section is not None else {}
    return write_base(folder, tensors, **{"dtype": "bfloat16", **sections, **config})


def read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def llama_in(folder: Path, dense: Path, pack: Any, section: dict[str, Any], *, keep: tuple[str, ...] = ()) -> Path:
    """The Llama in `dense` with its linears as `pack` (name, weight) gives them, but for the head and `keep`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_folder(dense).items():
        linear = tensor.dim() == 2 and "embed" not in name and "lm_head" not in name
        linear = linear and not any(part in name for part in keep)
        tensors |= pack(name, tensor) if linear else {name: tensor}
    config = {key: value for key, value in read_config(dense).items() if key != "quantization_config"}
    return write(folder, tensors, section, **config)
