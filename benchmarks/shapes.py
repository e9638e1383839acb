"""Checkpoints in the true shapes of large models, headers only, and adapters for them: what planning needs.

The files are sparse: their headers are written, their data is a hole of the right length. Whoever reads them sees
zeros, and what copies them fills the disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype as safetensors writes it, shape
ITEMSIZE = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
HUB_SHARD = 5_000_000_000
DEEPSEEK_SHARD = 4_300_000_000  # as on the Hub: 163 files
_FP8_BLOCK = 128
_FILLING = b"\x3c" * (1 << 20)  # BF16 0.0115, F32 0.0115, F8_E4M3 1.5
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """A dense model: its sizes as config.json names them."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int = 128256

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the order of the files on the Hub."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", "BF16", (self.vocab, hidden)
        for layer in range(self.layers):
            inside = f"model.layers.{layer}"
            yield f"{inside}.input_layernorm.weight", "BF16", (hidden,)
            yield f"{inside}.mlp.down_proj.weight", "BF16", (hidden, self.inner)
            yield f"{inside}.mlp.gate_proj.weight", "BF16", (self.inner, hidden)
            yield f"{inside}.mlp.up_proj.weight", "BF16", (self.inner, hidden)
            yield f"{inside}.post_attention_layernorm.weight", "BF16", (hidden,)
            yield f"{inside}.self_attn.k_proj.weight", "BF16", (kv, hidden)
            yield f"{inside}.self_attn.o_proj.weight", "BF16", (hidden, hidden)
            yield f"{inside}.self_attn.q_proj.weight", "BF16", (hidden, hidden)
            yield f"{inside}.self_attn.v_proj.weight", "BF16", (kv, hidden)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (self.vocab, hidden)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek:
    """A mixture of experts with DeepSeek-V3's names: the first `dense` layers have none. With `fp8` the linears are
    packed, with a scale for each 128 x 128 block. `shrink` divides every size, for tests that only count tensors."""

    layers: int = 61
    experts: int = 256
    dense: int = 3
    hidden: int = 7168
    fp8: bool = True
    shrink: int = 1

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the model, with the layer at its end that predicts a further token."""
        hidden = self.hidden // self.shrink
        yield "model.embed_tokens.weight", "BF16", (129280 // self.shrink, hidden)
        for layer in range(self.layers):
            yield from self._layer(f"model.layers.{layer}", is_dense=layer < self.dense)
        last = f"model.layers.{self.layers}"
        yield f"{last}.embed_tokens.weight", "BF16", (129280 // self.shrink, hidden)
        yield from self._vectors(f"{last}.enorm", self.hidden)
        yield from self._vectors(f"{last}.hnorm", self.hidden)
        yield f"{last}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
        yield from self._layer(last, is_dense=False)
        yield from self._vectors(f"{last}.shared_head.norm", self.hidden)
        yield f"{last}.shared_head.head.weight", "BF16", (129280 // self.shrink, hidden)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (129280 // self.shrink, hidden)

    def _layer(self, inside: str, *, is_dense: bool) -> Iterator[Tensor]:
        hidden = self.hidden
        attention = f"{inside}.self_attn"
        yield from self._vectors(f"{inside}.input_layernorm", hidden)
        yield from self._linear(f"{attention}.q_a_proj", 1536, hidden)
        yield from self._vectors(f"{attention}.q_a_layernorm", 1536)
        yield from self._linear(f"{attention}.q_b_proj", 24576, 1536)
        yield from self._linear(f"{attention}.kv_a_proj_with_mqa", 576, hidden)
        yield from self._vectors(f"{attention}.kv_a_layernorm", 512)
        yield from self._linear(f"{attention}.kv_b_proj", 32768, 512)
        yield from self._linear(f"{attention}.o_proj", hidden, 16384)
        yield from self._vectors(f"{inside}.post_attention_layernorm", hidden)
        if is_dense:
            yield from self._mlp(f"{inside}.mlp", 18432)
            return
        yield f"{inside}.mlp.gate.weight", "BF16", (self.experts, hidden // self.shrink)
        yield f"{inside}.mlp.gate.e_score_correction_bias", "F32", (self.experts,)
        for expert in range(self.experts):
            yield from self._mlp(f"{inside}.mlp.experts.{expert}", 2048)
        yield from self._mlp(f"{inside}.mlp.shared_experts", 2048)

    def _mlp(self, inside: str, inner: int) -> Iterator[Tensor]:
        yield from self._linear(f"{inside}.gate_proj", inner, self.hidden)
        yield from self._linear(f"{inside}.up_proj", inner, self.hidden)
        yield from self._linear(f"{inside}.down_proj", self.hidden, inner)

    def _linear(self, module: str, out: int, into: int) -> Iterator[Tensor]:
        out, into = max(1, out // self.shrink), max(1, into // self.shrink)
        yield f"{module}.weight", "F8_E4M3" if self.fp8 else "BF16", (out, into)
        if self.fp8:
            yield f"{module}.weight_scale_inv", "F32", (-(-out // _FP8_BLOCK), -(-into // _FP8_BLOCK))

    def _vectors(self, module: str, size: int) -> Iterator[Tensor]:
        yield f"{module}.weight", "BF16", (max(1, size // self.shrink),)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        packing = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK]}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden // self.shrink,
            "num_hidden_layers": self.layers,
            "n_routed_experts": self.experts,
            "vocab_size": 129280 // self.shrink,
            "tie_word_embeddings": False,
            **({"quantization_config": packing} if self.fp8 else {}),
        }


SHAPES: dict[str, Llama | DeepSeek] = {
    "8B": Llama(layers=32, hidden=4096, inner=14336, heads=32, kv_heads=8),
    "70B": Llama(layers=80, hidden=8192, inner=28672, heads=64, kv_heads=8),
    "405B": Llama(layers=126, hidden=16384, inner=53248, heads=128, kv_heads=8),
    "671B": DeepSeek(),
    "671B-bf16": DeepSeek(fp8=False),
}


def cut_shards(tensors: Iterable[Tensor], shard_nbytes: float) -> list[list[Tensor]]:
    """The files that `tensors` go into, filled in order up to `shard_nbytes`."""
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if shards[-1] and used + nbytes > shard_nbytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += nbytes
    return shards


def write_headers(
    folder: Path, shape: Llama | DeepSeek, *, shard_nbytes: float = HUB_SHARD, data: bool = False
) -> Path:
    """A checkpoint of `shape` in files of up to `shard_nbytes`: sparse, or with `data`, for small ones, filled."""
    folder.mkdir(parents=True)
    shards = cut_shards(shape.tensors(), shard_nbytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_file(folder / file, shard, fill=data)
        weight_map |= dict.fromkeys((name for name, _, _ in shard), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_nbytes, shape.tensors()))}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config))
    return folder


def write_lora(
    folder: Path, shape: Llama | DeepSeek, *, r: int = 1, experts: bool = False, most: int | None = None
) -> Path:
    """A LoRA on the linears of `shape`, those of experts only if asked for, `most` of them at most. All its values are
    equal and small, and fill the disk."""
    tensors: list[Tensor] = []
    for name, _, dims in shape.tensors():
        module = name.removesuffix(".weight")
        targets = _ATTENTION + (_MLP if experts or isinstance(shape, Llama) else ())
        if name == module or len(dims) != 2 or module.rpartition(".")[2] not in targets:
            continue
        key = f"base_model.model.{module}"
        tensors += [(f"{key}.lora_A.weight", "BF16", (r, dims[1])), (f"{key}.lora_B.weight", "BF16", (dims[0], r))]
        if most is not None and len(tensors) >= 2 * most:
            break
    folder.mkdir(parents=True)
    _write_file(folder / "adapter_model.safetensors", tensors, fill=True)
    modules = sorted({name.split(".")[-3] for name, _, _ in tensors})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor[2]) * ITEMSIZE[tensor[1]]


def _write_file(path: Path, tensors: list[Tensor], *, fill: bool) -> None:
    """A safetensors file with a hole for its data, or filled with bytes that every dtype reads as small numbers."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + _nbytes(tensor)
        entries[tensor[0]] = {"dtype": tensor[1], "shape": tensor[2], "data_offsets": [begin, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if not fill:
            file.truncate(8 + len(raw) + end)
        for begin in range(0, end if fill else 0, len(_FILLING)):
            file.write(_FILLING[: end - begin])
