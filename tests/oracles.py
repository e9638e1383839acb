"""Slow, obvious references: deltas in float64, 4-bit codes one by one, distances in units of the last place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

EPS = 2.0**-24


def deltas(adapter: Path, weight: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """For every base tensor that a plain LoRA changes: its delta, and `weight * |scaling| * |B| @ |A|`, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    result = {}
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        module = key.removeprefix("base_model.model.").split(".lora_A.")[0]
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        r, alpha = a.shape[0], config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        scaling = weight * alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        result[f"{module}.weight"] = (
            scaling * (b.double() @ a.double()),
            abs(scaling) * (b.double().abs() @ a.double().abs()),
        )
    return result


def merged(base: dict[str, Tensor], adapters: Iterable[tuple[Path, float]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every tensor of the merge in float64, and the magnitude of the sum that float32 noise is proportional to."""
    result = {name: (tensor.double(), tensor.double().abs()) for name, tensor in base.items()}
    for folder, weight in adapters:
        for name, (delta, magnitude) in deltas(folder, weight).items():
            value, bound = result[name]
            result[name] = (value + delta, bound + magnitude)
    return result


def assert_rounded_once(out: Tensor, exact: Tensor, magnitude: Tensor, *, terms: int, name: str = "") -> None:
    """`out` is within half an ulp of its dtype plus float32 noise (`terms` additions) of `exact`."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[out.dtype]
    smallest = {torch.bfloat16: -133, torch.float16: -24, torch.float32: -149}[out.dtype]
    error = (out.double() - exact).abs()
    _, exponent = torch.frexp(torch.maximum(out.double().abs(), exact.abs()))
    half_ulp = torch.exp2((exponent - bits).clamp_min(smallest).double()) / 2
    over = error - half_ulp - magnitude * EPS * terms
    assert bool((over <= 0).all()), f"{name}: {int((over > 0).sum())} elements, worst by {float(over.max()):.3g}"


def dequantize_4bit(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A bitsandbytes 4-bit weight as floats of its recorded dtype, element by element formula, high nibble first."""
    key = next(key for key in tensors if key.startswith(f"{name}.quant_state.bitsandbytes__"))
    state = json.loads(bytes(tensors[key].tolist()))
    absmax = tensors[f"{name}.absmax"]
    if f"{name}.nested_absmax" in tensors:
        scales = tensors[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
        absmax = tensors[f"{name}.nested_quant_map"][absmax.long()] * scales + torch.tensor(state["nested_offset"])
    elif absmax.dim() == 2:
        absmax = absmax.T.reshape(-1)
    data = tensors[name].contiguous().view(-1).view(torch.uint8)
    codes = torch.stack([data >> 4, data & 15], dim=1).view(-1).long()[: math.prod(state["shape"])]
    scales = absmax.float().repeat_interleave(state["blocksize"])[: codes.numel()]
    values = tensors[f"{name}.quant_map"][codes] * scales
    return values.view(state["shape"]).to(getattr(torch, state["dtype"]))


def dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with every 4-bit weight dequantized and its companions gone."""
    packed = {key.split(".quant_state.")[0] for key in tensors if ".quant_state." in key}
    companion = re.compile(r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)")
    return {
        name: dequantize_4bit(tensors, name) if name in packed else tensor
        for name, tensor in tensors.items()
        if not companion.fullmatch(name)
    }


def assert_merged(
    output: Path, base: dict[str, Tensor], adapters: Iterable[tuple[Path, float]], dtype: torch.dtype | None = None
) -> None:
    """`output` holds `base` (dense) plus the adapters: changed tensors rounded once, all others cast or untouched.

    `dtype` is that of every float of the output; None: each tensor's own.
    """
    from tests.factories import load_folder

    adapters = list(adapters)
    found, exact = load_folder(output), merged(base, adapters)
    changed = {name for folder, _ in adapters for name in deltas(folder)}
    assert changed
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        expected = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype, name
        if name in changed:
            assert not torch.equal(found[name], expected), f"{name}: nothing was applied"
            assert_rounded_once(found[name], *exact[name], terms=24, name=name)
        else:
            assert torch.equal(found[name], expected), name
