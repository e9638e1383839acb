"""Checkpoints and adapters of any size for benchmarks: the shapes of a small Llama, values drawn from one pool.

They load in transformers and PEFT like real ones. What they hold means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
_POOL_NUMEL = 1 << 25


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


def num_layers(nbytes: float, itemsize: int = 2) -> int:
    """How many layers make a model of about `nbytes` bytes."""
    per_layer = itemsize * sum(rows * cols for rows, cols in LINEARS.values())
    return max(1, round((nbytes - itemsize * 2 * VOCAB * HIDDEN) / per_layer))


def make_base(folder: Path, *, nbytes: float, shard_nbytes: float = 1e9, dtype: str = "bfloat16") -> Path:
    """A Llama checkpoint of about `nbytes` bytes in files of about `shard_nbytes`."""
    folder.mkdir(parents=True)
    pool, layers = _Pool(DTYPES[dtype]), num_layers(nbytes, DTYPES[dtype].itemsize)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, shape in _tensors(layers):
        tensor = pool.take(shape) if len(shape) == 2 else torch.ones(shape, dtype=DTYPES[dtype])
        if used and used + tensor.nbytes > shard_nbytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder: Path, base: Path, *, r: int = 16, targets: tuple[str, ...] = tuple(LINEARS)) -> Path:
    """A LoRA with alpha = 2 r on the linears `targets` of every layer of a base that `make_base` made."""
    pool = _Pool(torch.float32)
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    tensors = {}
    for layer in range(layers):
        for name in targets:
            rows, cols = LINEARS[name]
            key = f"base_model.model.model.layers.{layer}.{name}"
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


def _tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        for name, shape in LINEARS.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)
