"""Checkpoints and adapters of any size for benchmarks: the shapes of a small Llama, values drawn from one pool.

They load in transformers and PEFT like real ones. What they hold means nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_POOL_NUMEL = 1 << 25
_SMALL_NBYTES = 600e6  # below, the embeddings of TinyLlama alone would be most of the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The dimensions of a Llama."""

    hidden: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linears of a layer: name and shape (out, in)."""
        narrow = self.hidden * self.kv_heads // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


TINY_LLAMA = Sizes(hidden=2048, inner=5632, vocab=32000, heads=32, kv_heads=4)
SMALL = Sizes(hidden=512, inner=1408, vocab=4000, heads=8, kv_heads=2)
LINEARS = TINY_LLAMA.linears


class _Pool:
    """Normal values, standard deviation 0.02, drawn once and handed out from changing places."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self._values = torch.randn(_POOL_NUMEL, generator=generator).mul_(0.02).to(dtype)
        self._place = 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        numel = torch.Size(shape).numel()
        self._place = (self._place + 4099) % (1 << 20)
        parts = [self._values[self._place :][:numel]] * -(-numel // (_POOL_NUMEL - self._place))
        return torch.cat(parts)[:numel].view(shape).clone()


def sizes_for(nbytes: float) -> Sizes:
    """The dimensions of a model of about `nbytes` bytes."""
    return TINY_LLAMA if nbytes >= _SMALL_NBYTES else SMALL


def num_layers(nbytes: float, itemsize: int = 2, sizes: Sizes | None = None) -> int:
    """How many layers make a model of about `nbytes` bytes."""
    sizes = sizes or sizes_for(nbytes)
    per_layer = itemsize * sum(rows * cols for rows, cols in sizes.linears.values())
    return max(1, round((nbytes - itemsize * 2 * sizes.vocab * sizes.hidden) / per_layer))


def make_base(folder: Path, *, nbytes: float, shard_nbytes: float = 1e9, dtype: str = "bfloat16") -> Path:
    """A Llama checkpoint of about `nbytes` bytes in files of about `shard_nbytes`, which hold whole layers; the first
    one has all that is outside the layers."""
    folder.mkdir(parents=True)
    sizes, itemsize = sizes_for(nbytes), DTYPES[dtype].itemsize
    pool, layers = _Pool(DTYPES[dtype]), num_layers(nbytes, itemsize, sizes)
    shards: list[list[dict[str, tuple[int, ...]]]] = [[]]
    used = 0
    for group in _groups(sizes, layers):
        group_nbytes = itemsize * sum(torch.Size(shape).numel() for shape in group.values())
        if used and used + group_nbytes > shard_nbytes:
            shards.append([])
            used = 0
        shards[-1].append(group)
        used += group_nbytes
    files: dict[str, list[str]] = {}
    for number, groups in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        shapes = {name: shape for group in groups for name, shape in group.items()}
        tensors = {n: pool.take(s) if len(s) == 2 else torch.ones(s, dtype=DTYPES[dtype]) for n, s in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files[file] = list(tensors)
    _write_index(folder, files)
    _write_config(folder, sizes, layers, dtype)
    return folder


def make_part(folder: Path, base: Path, *, num_files: int) -> Path:
    """The model of the first `num_files` files of a sharded `base` that `make_base` made: the same files, linked."""
    folder.mkdir(parents=True)
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    names = sorted(set(weight_map.values()))[:num_files]
    files = {}
    for number, name in enumerate(names, start=1):
        file = f"model-{number:05}-of-{num_files:05}.safetensors" if num_files > 1 else "model.safetensors"
        os.link(base / name, folder / file)
        files[file] = [tensor for tensor, home in weight_map.items() if home == name]
    _write_index(folder, files)
    layers = {name.split(".")[2] for names in files.values() for name in names if name.startswith("model.layers.")}
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": len(layers)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_single(folder: Path, *, nbytes: float) -> Path:
    """A checkpoint whose one tensor, a linear that `make_adapter` finds, has about `nbytes` bytes in bfloat16."""
    folder.mkdir(parents=True)
    cols = 1 << 14
    rows = max(1, round(nbytes / 2 / cols))
    tensors = {"model.layers.0.mlp.down_proj.weight": _Pool(torch.bfloat16).take((rows, cols))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(folder, SMALL, 1, "bfloat16")
    return folder


def make_adapter(folder: Path, base: Path, *, r: int = 16, targets: tuple[str, ...] = tuple(LINEARS)) -> Path:
    """A LoRA with alpha = 2 r on the linears `targets` of every layer of a base that this module made."""
    pool, tensors = _Pool(torch.float32), {}
    for name, (rows, cols) in sorted(_linears(base, targets).items()):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = pool.take((r, cols))
        tensors[f"{key}.lora_B.weight"] = pool.take((rows, r))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in targets}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def share_equal(base: Path, adapter: Path, output: Path) -> float:
    """The share of the elements of layer 0's linears in `output` that are the nearest value to base + 2 B A in
    float64: what tells that a tool did the work that it is timed for."""
    stored, merged = (_layer(folder, "model.layers.0.") for folder in (base, output))
    factors = load_file(adapter / "adapter_model.safetensors")
    equal = total = 0
    for name, weight in stored.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            delta = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            due = (weight.double() + 2 * delta).float().to(weight.dtype)
            equal += int((due == merged[name]).sum())
            total += due.numel()
    return equal / total


def _layer(folder: Path, prefix: str) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return found


def pack_base(folder: Path, dense: Path) -> Path:
    """`dense` with its layers' linears packed in NF4, scales too, by bitsandbytes' CPU functions, as transformers saves
    it and loads it again."""
    from bitsandbytes import functional

    folder.mkdir(parents=True)
    files: dict[str, list[str]] = {}
    for path in sorted(dense.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(path).items():
            if ".layers." not in name or tensor.dim() != 2:
                tensors[name] = tensor
                continue
            packed, state = functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
            tensors[name] = packed
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
        files[path.name] = list(tensors)
    _write_index(folder, files)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _groups(sizes: Sizes, layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of a model, those that must lie in one file together: each layer, and what is outside the layers with
    the first of them."""
    hidden, vocab = sizes.hidden, sizes.vocab
    outside: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        linears = {f"{prefix}.{name}.weight": shape for name, shape in sizes.linears.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        yield {**outside, **linears, **{f"{prefix}.{name}.weight": (hidden,) for name in norms}}
        outside = {}


def _linears(base: Path, targets: Iterable[str]) -> dict[str, list[int]]:
    """The weights of the linears `targets` in the files of `base`, with their shapes."""
    found = {}
    for path in sorted(base.glob("*.safetensors")):
        for name, entry in _header(path).items():
            if name.endswith(tuple(f".{target}.weight" for target in targets)):
                found[name] = entry["shape"]
    return found


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(header)


def _write_index(folder: Path, files: dict[str, list[str]]) -> None:
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_config(folder: Path, sizes: Sizes, layers: int, dtype: str) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
