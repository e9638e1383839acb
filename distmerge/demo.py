"""`distmerge demo`: a small sharded NF4 base and an adapter, made on the spot, merged, verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from distmerge.checkpoint.base import INDEX, RECEIPT
from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import InputError
from distmerge.numerics.nf4 import NF4
from distmerge.numerics.packing4 import NESTED_BLOCKSIZE, dynamic_map, nest, pack

if TYPE_CHECKING:
    from distmerge.audit.findings import Audit

_HIDDEN, _INNER, _LAYERS, _VOCAB, _R, _ALPHA = 512, 1376, 8, 4096, 16, 32
_SHARD_NBYTES = 20_000_000
_MARK = ".distmerge-demo"
_LINEARS = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_HIDDEN // 2, _HIDDEN),
    "self_attn.v_proj": (_HIDDEN // 2, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_INNER, _HIDDEN),
    "mlp.up_proj": (_INNER, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INNER),
}


def run_demo(folder: Path, *, nproc: int, say: Callable[[str], None], verified: Callable[[Audit], str]) -> None:
    """Makes `folder`/base and `folder`/adapter, merges them into `folder`/merged on `nproc` ranks and verifies it.

    Raises InputError if `folder` is there and no demo made it.
    """
    from distmerge import merge, verify  # it needs the whole package

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / _MARK).exists():
            raise InputError("is there and no demo made it", where=str(folder), hint="choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    base, adapter, output = folder / "base", folder / "adapter", folder / "merged"
    make_base(base)
    make_adapter(adapter)
    say(f"made     {base}: a Llama of {_LAYERS} layers in 3 shards, its linears packed in NF4 (double quantization)")
    say(f"made     {adapter}: a LoRA of r {_R}, alpha {_ALPHA}, on all its linears")
    choice = AdapterChoice(folder=adapter)
    result = merge(MergeConfig(base=base, adapters=(choice,), output=output, nproc=nproc, max_shard_size=_SHARD_NBYTES))
    say(f"merged   {result.num_adapter_tensors} adapter tensors on {nproc} ranks in {result.seconds:.1f} s")
    say(verified(verify(output, base=base, adapters=(choice,))))
    say(f"result   {output}  (what was done: {output / RECEIPT})")


def make_base(folder: Path) -> None:
    """A Llama checkpoint in three shards, random but seeded, as transformers and bitsandbytes write it."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": torch.randn(_VOCAB, _HIDDEN, generator=generator).mul(0.02).bfloat16(),
        "model.norm.weight": torch.ones(_HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(_VOCAB, _HIDDEN, generator=generator).mul(0.02).bfloat16(),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(_HIDDEN, dtype=torch.bfloat16)
        for name, shape in _LINEARS.items():
            tensors |= _packed(f"{prefix}.{name}.weight", torch.randn(shape, generator=generator) * 0.02)
    folder.mkdir(parents=True)
    names = sorted(tensors)
    shards = [names[i * len(names) // 3 : (i + 1) * len(names) // 3] for i in range(3)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2), encoding="utf-8")


def make_adapter(folder: Path) -> None:
    """A LoRA on every linear of the demo's base, as PEFT saves it; random, seeded, with nothing zero."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(_LAYERS):
        for name, (rows, cols) in _LINEARS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(_R, cols, generator=generator) / cols**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, _R, generator=generator) * 0.001
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": _R,
        "lora_alpha": _ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name.split(".")[1] for name in _LINEARS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    data, absmax = pack(weight.bfloat16().view(-1), NF4, blocksize=64)
    nested = nest(absmax)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCKSIZE,
        "nested_dtype": "float32",
        "nested_offset": nested.offset,
    }
    return {
        name: data[:, None].clone(),
        f"{name}.absmax": nested.codes,
        f"{name}.quant_map": NF4.clone(),
        f"{name}.nested_absmax": nested.absmax,
        f"{name}.nested_quant_map": dynamic_map(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": _HIDDEN // 8,
    "vocab_size": _VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    },
}
