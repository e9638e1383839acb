"""Small bases and adapters on disk, from a description; their values do not matter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distmerge.checkpoint.header import ITEMSIZE, build_header

ONES = {"F32": b"\0\0\x80\x3f", "BF16": b"\x80\x3f", "F16": b"\0\x3c"}
Tensors = list[tuple[str, str, tuple[int, ...]]]


def write_file(path: Path, tensors: Tensors) -> None:
    """A weight file of ones; whole numbers are zeros."""
    data = (ONES.get(dtype, bytes(ITEMSIZE[dtype])) * math.prod(shape) for _, dtype, shape in tensors)
    path.write_bytes(build_header(tensors) + b"".join(data))


def write_base(folder: Path, files: dict[str, Tensors], config: dict[str, Any]) -> Path:
    """A base of these files, with an index if there are several."""
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        write_file(folder / name, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    if "model.safetensors" not in files:
        weight_map = {tensor[0]: file for file, tensors in files.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_adapter(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """An adapter folder."""
    folder.mkdir(parents=True)
    write_file(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_scene(folder: Path) -> tuple[Path, Path]:
    """A base of two files and a LoRA on one linear of each."""
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    files: dict[str, Tensors] = {
        f"model-0000{n}-of-00002.safetensors": [(f"{name}.weight", "F32", (4, 6)), (f"{name}.bias", "F32", (4,))]
        for n, name in enumerate(names, start=1)
    }
    front = "base_model.model."
    factors = [
        (f"{front}{name}.lora_{x}.weight", "F32", s) for name in names for x, s in (("A", (2, 6)), ("B", (4, 2)))
    ]
    base = write_base(folder / "base", files, {"model_type": "llama"})
    return base, write_adapter(folder / "lora", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
